# GRPO: four answers to each prompt, each against their mean, in units of their spread; no critic (arXiv 2402.03300).
# python ppo.py config/wordplay/grpo.py
#
# Result, one seed: 0.639 -> 0.940 by sampling at KL 0.351, 0.985 -> 0.986 greedily; PPO with a critic: 0.935 at 0.364.

out_dir = 'out/grpo'
adv = 'grpo'
kl_coef = 0.1
