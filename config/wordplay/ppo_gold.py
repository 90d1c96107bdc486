# PPO with the true measure as its reward: what PPO itself can do, apart from what the reward model gets wrong.
# python ppo.py config/wordplay/ppo_gold.py
#
# Result, three seeds: 0.647 -> 0.922, 0.645 -> 0.931 and 0.632 -> 0.916 by sampling at KL 0.323, 0.330 and 0.331, greedily
# 0.987 -> 0.989, 0.990 -> 0.995 and 0.994 -> 0.993.

out_dir = 'out/ppo_gold'
reward = 'gold'
kl_coef = 0.05
