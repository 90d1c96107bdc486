# Three losses for a reward model: Bradley-Terry; margin ranking, which is 0 once a pair's scores
# differ by the margin; and Bradley-Terry with a margin for each pair (arXiv 2307.09288). Their
# values cannot be compared with each other, but accuracy and calibration can.
#
#     for l in bt margin bt_margin; do
#         python reward.py config/wordplay/reward.py config/course/reward_loss.py --loss=$l \
#             --out_dir=out/reward_$l
#     done
#     python assets/draw.py out/reward_bt out/reward_margin out/reward_bt_margin \
#         --metrics=accuracy_clean,auc,calibration_error --out=out/reward_curves.png
#
# It needs out/sft, made with config/wordplay/sft.py.
#
# Result after one epoch of 8,000 pairs:
#
#                                bt   margin   bt_margin
#     accuracy, clean labels  0.802    0.851       0.810
#     AUC                      0.76     0.81        0.79
#     calibration error        0.06     0.05        0.06
#
# The calibration error is that of the scaled scores. So early in training all three are
# under-confident: the best scale is 2 to 3. The gradient of the margin loss does not shrink as a
# pair is learned, which helps here. Two to three minutes per run on one core of a 2-core CPU
# with AVX-512.

max_pairs = 8000
max_iters = 500       # one epoch
eval_interval = 100
