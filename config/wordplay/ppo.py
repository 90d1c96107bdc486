# The chain on wordplay, 4 of 4: PPO with the learned reward.
# python ppo.py config/wordplay/ppo.py
#
# Result, three seeds: 0.639 -> 0.935, 0.625 -> 0.942 and 0.620 -> 0.942 by sampling at KL 0.364, 0.363 and 0.374, greedily
# 0.985 -> 0.980, 0.987 -> 0.989 and 0.986 -> 0.986; 4 minutes on one core of the 2-core CPU with AVX2.

out_dir = 'out/ppo'
init_from = 'out/sft'
reward_model = 'out/reward'
kl_coef = 0.1
