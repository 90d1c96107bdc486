# RLOO: four answers to each prompt, each against the mean of the other three; no critic (arXiv 2402.14740).
# python ppo.py config/wordplay/rloo.py
#
# Result, one seed: 0.639 -> 0.940 by sampling at KL 0.356, 0.985 -> 0.982 greedily; PPO with a critic: 0.935 at 0.364.

out_dir = 'out/rloo'
adv = 'rloo'
kl_coef = 0.1
