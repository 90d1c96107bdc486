# The losses of a reward model: Bradley-Terry; margin ranking, which has no more to learn from a pair that is a margin
# apart; and Bradley-Terry with each pair's own margin (arXiv 2307.09288). Their loss values cannot be compared; accuracy
# and calibration can.
# for l in bt margin bt_margin; do python reward.py config/wordplay/reward.py config/course/reward_loss.py --loss=$l --out_dir=out/reward_$l; done
# python configurator.py out/reward_bt out/reward_margin out/reward_bt_margin --metrics=accuracy,calibration_error,auc
#
# Needs out/sft, of config/wordplay/sft.py.
# Result: after 8,000 pairs once, accuracy on clean labels 0.799 with Bradley-Terry, 0.828 with the margin, 0.790 with
# Bradley-Terry and each pair's margin; AUC 0.74, 0.77, 0.74; calibration error, at the scale that fits, 0.07, 0.05, 0.06: all are
# timid so early in training, and should be 2 to 3 times as sure (best_scale). What a pair asks for at the margin does not fade as
# it is learned, which helps here. A minute and a half each on one core of the 2-core CPU with AVX-512.

max_pairs = 8000
max_iters = 500   # each of them once
eval_interval = 100
