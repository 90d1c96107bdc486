# The chain on wordplay, 4 of 4: PPO with the learned reward.
# python ppo.py config/wordplay/ppo.py
#
# Result, three seeds: 0.647 -> 0.898, 0.645 -> 0.906 and 0.632 -> 0.885 by sampling at KL 0.319, 0.336 and 0.328, greedily
# 0.987 -> 0.984, 0.990 -> 0.985 and 0.994 -> 0.980; 6.3 minutes on the 2-core CPU with AVX2, 119 answers a second.

out_dir = 'out/ppo'
init_from = 'out/sft'
reward_model = 'out/reward'
kl_coef = 0.1
