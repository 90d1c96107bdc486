# The losses of a reward model: Bradley-Terry; margin ranking, which has no more to learn from a pair that is a margin
# apart; and Bradley-Terry with each pair's own margin (arXiv 2307.09288). Their loss values cannot be compared; accuracy
# and calibration can.
# for l in bt margin bt_margin; do python reward.py config/wordplay/reward.py config/course/reward_loss.py --loss=$l --out_dir=out/reward_$l; done
# python configurator.py out/reward_bt out/reward_margin out/reward_bt_margin --metrics=accuracy,calibration_error,auc
#
# Needs out/sft, of config/wordplay/sft.py.
# Result: none yet at this length; the commands have been run for a few steps.

max_pairs = 8000
max_iters = 500   # each of them once
eval_interval = 100
