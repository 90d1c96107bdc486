# Learning-rate schedules: a cosine (arXiv 1608.03983), a straight line, a constant rate that decays
# in the last fifth of the run (wsd, arXiv 2405.18392), and a constant rate.
#
#     for l in cosine linear wsd constant; do
#         for w in 0 20; do
#             python train.py config/course/small.py config/course/schedule.py --lr_schedule=$l \
#                 --warmup_iters=$w --out_dir=out/$l-$w
#         done
#     done
#     python assets/draw_schedules.py out/cosine-0 out/cosine-20 out/linear-0 out/linear-20 \
#         out/wsd-0 out/wsd-20 out/constant-0 out/constant-20 --out=out/schedules.png
#
# Result, in nats per byte:
#
#     schedule                   cosine   linear      wsd   constant
#     no warm-up                  2.045    2.018    2.009      2.067
#     20 steps of warm-up         2.065    2.042    2.018      2.070

eval_interval = 25
