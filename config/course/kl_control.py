# KL control: a penalty with a fixed coefficient, a coefficient that adapts to reach kl_target nats
# per response (arXiv 1909.08593, section 2.2), and no penalty. Without one, the score may rise
# while gold, the ground truth that it stands for, no longer does (arXiv 2210.10760).
#
#     for k in fixed adaptive none; do
#         python ppo.py config/wordplay/ppo.py config/course/kl_control.py --kl_control=$k \
#             --out_dir=out/kl_$k
#     done
#     python assets/draw.py out/kl_fixed out/kl_adaptive out/kl_none \
#         --metrics=objective/kl_exact,objective/score,objective/gold,objective/kl_coef
#
# It needs out/sft and out/reward, made with config/wordplay/sft.py and config/wordplay/reward.py.
#
# Result after 40 iterations, with the KL in nats per response:
#
#                          before   fixed   adaptive    none
#     sampled exact match   0.635   0.918      0.921   0.920
#     greedy exact match    0.986   0.976      0.978   0.968
#     KL                            0.358      0.374   0.389
#
# There is hardly a difference: with this reward model, 40 iterations need no penalty. The adaptive
# coefficient fell from 0.10 to 0.07, because the KL stayed below its target of 0.4.
# config/wordplay/hacking.py shows a reward model that does need a penalty. Two to three minutes per
# run on one core of a 2-core CPU with AVX-512.

max_iters = 40
eval_interval = 20
test_prompts = 500
