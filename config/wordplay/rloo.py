# RLOO: four answers to each prompt, each against the mean of the other three; no critic (arXiv 2402.14740).
# python ppo.py config/wordplay/rloo.py
#
# Result, one seed: 0.644 -> 0.931 by sampling at KL 0.340, 0.987 -> 0.986 greedily; PPO with a critic: 0.940 at 0.346.

out_dir = 'out/rloo'
adv = 'rloo'
kl_coef = 0.1
