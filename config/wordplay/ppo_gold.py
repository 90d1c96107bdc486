# PPO with the true measure as its reward: what PPO itself can do, apart from what the reward model gets wrong.
# python ppo.py config/wordplay/ppo_gold.py
#
# Result, three seeds: 0.646 -> 0.960, 0.654 -> 0.958 and 0.647 -> 0.965 by sampling at KL 0.377, 0.366 and 0.372, greedily
# 0.989 -> 0.989, 0.991 -> 0.990 and 0.990 -> 0.992.

out_dir = 'out/ppo_gold'
reward = 'gold'
kl_coef = 0.05
