# PPO with the true measure as its reward: what PPO itself can do, apart from what the reward model gets wrong.
# python ppo.py config/wordplay/ppo_gold.py
#
# Result: 0.639 -> 0.864 by sampling at KL 0.214, 0.990 -> 0.988 greedily; 252 s on one core.

out_dir = 'out/ppo_gold'
reward = 'gold'
kl_coef = 0.05
