# PPO with the true measure as its reward: what PPO itself can do, apart from what the reward model gets wrong.
# python ppo.py config/wordplay/ppo_gold.py
#
# Result of 120 iterations, one seed: 0.651 -> 0.922 by sampling at KL 0.329, 0.990 -> 0.991 greedily; 328 s on one core, 94 answers
# a second.

out_dir = 'out/ppo_gold'
reward = 'gold'
kl_coef = 0.05
