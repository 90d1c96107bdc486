# The chain on wordplay, 4 of 4: PPO with the learned reward.
# python ppo.py config/wordplay/ppo.py
#
# Result, three seeds: 0.644 -> 0.940, 0.637 -> 0.941 and 0.630 -> 0.936 by sampling at KL 0.346, 0.352 and 0.355, greedily
# 0.987 -> 0.984, 0.990 -> 0.987 and 0.994 -> 0.984; 4 minutes on one core of the 2-core CPU with AVX2.

out_dir = 'out/ppo'
init_from = 'out/sft'
reward_model = 'out/reward'
kl_coef = 0.1
