# RLOO: four answers to each prompt, each against the mean of the other three; no critic (arXiv 2402.14740).
# python ppo.py config/wordplay/rloo.py
#
# Result, one seed: 0.647 -> 0.895 by sampling at KL 0.326, 0.987 -> 0.982 greedily; PPO with a critic: 0.900 at 0.320.

out_dir = 'out/rloo'
adv = 'rloo'
kl_coef = 0.1
