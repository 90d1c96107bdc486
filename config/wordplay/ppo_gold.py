# PPO with the true measure as its reward: what PPO itself can do, apart from what the reward model gets wrong.
# python ppo.py config/wordplay/ppo_gold.py
#
# Result, three seeds: 0.639 -> 0.948, 0.625 -> 0.946 and 0.620 -> 0.950 by sampling at KL 0.364, 0.372 and 0.375, greedily
# 0.985 -> 0.986, 0.987 -> 0.988 and 0.986 -> 0.991.

out_dir = 'out/ppo_gold'
reward = 'gold'
kl_coef = 0.05
