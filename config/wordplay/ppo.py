# Wordplay, stage 4 of 4: PPO with the learned reward.
#
#     python ppo.py config/wordplay/ppo.py
#
# Result on 1,000 held-out prompts, before -> after, with the KL in nats per response:
#
#     seed                               1                2                3
#     sampled exact match   0.646 -> 0.947   0.654 -> 0.949   0.647 -> 0.953
#     greedy exact match    0.989 -> 0.987   0.991 -> 0.987   0.990 -> 0.987
#     KL                             0.370            0.361            0.381
#
# Two minutes on one core of a 2-core CPU with AVX-512.

out_dir = 'out/ppo'
init_from = 'out/sft'
reward_model = 'out/reward'
kl_coef = 0.1
