# PPO with the true measure as its reward: what PPO itself can do, apart from what the reward model gets wrong.
# python ppo.py config/wordplay/ppo_gold.py
#
# Result, three seeds: 0.647 -> 0.946, 0.638 -> 0.957 and 0.636 -> 0.952 by sampling at KL 0.361, 0.357 and 0.359, greedily
# 0.987 -> 0.987, 0.990 -> 0.994 and 0.994 -> 0.993.

out_dir = 'out/ppo_gold'
reward = 'gold'
kl_coef = 0.05
