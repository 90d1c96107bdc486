# The chain on wordplay, 4 of 4: PPO with the learned reward.
# python ppo.py config/wordplay/ppo.py
#
# Result, two seeds: 0.647 -> 0.900 and 0.646 -> 0.914 by sampling at KL 0.320 and 0.331, 0.987 -> 0.982 and 0.990 -> 0.986
# greedily; about 6 minutes on a free core, 95 answers a second.

out_dir = 'out/ppo'
init_from = 'out/sft'
reward_model = 'out/reward'
kl_coef = 0.1
