# RLOO: four answers to each prompt, each against the mean of the other three; no critic (arXiv 2402.14740).
# python ppo.py config/wordplay/rloo.py
#
# Result, one seed: 0.646 -> 0.936 by sampling at KL 0.360, 0.989 -> 0.978 greedily; PPO with a critic: 0.947 at 0.370.

out_dir = 'out/rloo'
adv = 'rloo'
kl_coef = 0.1
