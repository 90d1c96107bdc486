# The chain on wordplay, 4 of 4: PPO with the learned reward.
# python ppo.py config/wordplay/ppo.py
#
# Result, three seeds: 0.647 -> 0.943, 0.638 -> 0.944 and 0.636 -> 0.935 by sampling at KL 0.353, 0.355 and 0.354, greedily
# 0.987 -> 0.987, 0.990 -> 0.985 and 0.994 -> 0.984; 4 minutes on one core of the 2-core CPU with AVX2.

out_dir = 'out/ppo'
init_from = 'out/sft'
reward_model = 'out/reward'
kl_coef = 0.1
