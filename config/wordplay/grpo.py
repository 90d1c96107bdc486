# GRPO: four answers to each prompt, each against their mean, in units of their spread; no critic (arXiv 2402.03300).
# python ppo.py config/wordplay/grpo.py
#
# Result, one seed: 0.646 -> 0.938 by sampling at KL 0.361, 0.989 -> 0.983 greedily; PPO with a critic: 0.947 at 0.370.

out_dir = 'out/grpo'
adv = 'grpo'
kl_coef = 0.1
