# Learning-rate schedules: a cosine (arXiv 1608.03983), a straight line, a constant rate that decays
# in the last fifth of the run (wsd, arXiv 2405.18392), and a constant rate.
#
#     for l in cosine linear wsd constant; do
#         python train.py config/course/small.py config/course/schedule.py --lr_schedule=$l \
#             --out_dir=out/$l
#     done
#     python assets/draw.py out/cosine out/linear out/wsd out/constant --metrics=lr,val_loss \
#         --first=50
#
# Result, in nats per byte, with squared ReLU in the MLP; to be measured again:
# cosine 2.096, linear 2.073, wsd 2.055, constant 2.103.

eval_interval = 25
