# RLOO: four answers to each prompt, each against the mean of the other three; no critic (arXiv 2402.14740).
# python ppo.py config/wordplay/rloo.py
#
# Result with config/course/advantages.py, 40 iterations: there.

out_dir = 'out/rloo'
adv = 'rloo'
kl_coef = 0.1
