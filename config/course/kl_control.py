# KL control where it matters: PPO with a reward model that was trained on 400 pairs and memorised
# them. Without a penalty the score rises while gold, the truth that it stands for, falls (arXiv
# 2210.10760). A penalty with a fixed coefficient, or with one that adapts to reach kl_target nats
# per response (arXiv 1909.08593, section 2.2), keeps the policy near the SFT model.
#
#     for k in none fixed adaptive; do
#         python ppo.py config/course/kl_control.py --kl_control=$k --out_dir=out/kl_$k
#     done
#     python assets/draw.py out/kl_none out/kl_fixed out/kl_adaptive --out=out/kl_control.png \
#         --metrics=objective/gold,objective/score,objective/kl_exact
#
# It needs out/sft and out/reward_few, made with config/wordplay/sft.py and
# config/wordplay/reward_few.py.
#
# Result after 60 iterations; 0.672 of the samples are correct before:
#
#                               none   fixed   adaptive
#     sampled exact match      0.054   0.685      0.549
#     KL, nats per response     22.7    0.16       0.58

out_dir = 'out/kl_fixed'
reward_model = 'out/reward_few'
kl_coef = 0.3
kl_target = 0.5
kl_horizon = 500      # the coefficient changes by at most 10% per iteration
max_iters = 60
eval_interval = 30
test_prompts = 200
