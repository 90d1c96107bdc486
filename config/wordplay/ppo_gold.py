# PPO with the dataset's checking function, gold, as the reward. It shows what PPO can do without
# the errors of a reward model.
#
#     python ppo.py config/wordplay/ppo_gold.py
#
# Result on 1,000 held-out prompts, before -> after, with the KL in nats per response:
#
#     seed                               1                2                3
#     sampled exact match   0.646 -> 0.960   0.654 -> 0.958   0.647 -> 0.965
#     greedy exact match    0.989 -> 0.989   0.991 -> 0.990   0.990 -> 0.992
#     KL                             0.377            0.366            0.372

out_dir = 'out/ppo_gold'
reward = 'gold'
kl_coef = 0.05
