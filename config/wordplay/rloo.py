# RLOO: four answers to each prompt, each against the mean of the other three; no critic (arXiv 2402.14740).
# python ppo.py config/wordplay/rloo.py
#
# Result, one seed: 0.647 -> 0.936 by sampling at KL 0.344, 0.987 -> 0.984 greedily; PPO with a critic: 0.943 at 0.353.

out_dir = 'out/rloo'
adv = 'rloo'
kl_coef = 0.1
