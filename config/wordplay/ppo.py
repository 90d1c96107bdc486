# The chain on wordplay, 4 of 4: PPO with the learned reward.
# python ppo.py config/wordplay/ppo.py
#
# Result, three seeds: 0.646 -> 0.947, 0.654 -> 0.949 and 0.647 -> 0.953 by sampling at KL 0.370, 0.361 and 0.381, greedily
# 0.989 -> 0.987, 0.991 -> 0.987 and 0.990 -> 0.987; 2 minutes on one core of the 2-core CPU with AVX-512.

out_dir = 'out/ppo'
init_from = 'out/sft'
reward_model = 'out/reward'
kl_coef = 0.1
