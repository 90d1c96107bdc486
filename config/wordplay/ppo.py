# The chain on wordplay, 4 of 4: PPO with the learned reward.
# python ppo.py config/wordplay/ppo.py
#
# Result: 0.640 -> 0.834 by sampling at KL 0.233, 0.987 -> 0.977 greedily; 255 s on one core, 81 answers a second.

out_dir = 'out/ppo'
init_from = 'out/sft'
reward_model = 'out/reward'
kl_coef = 0.1
