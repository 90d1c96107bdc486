# GRPO: four answers to each prompt, each against their mean, in units of their spread; no critic (arXiv 2402.03300).
# python ppo.py config/wordplay/grpo.py
#
# Result, one seed: 0.647 -> 0.875 by sampling at KL 0.516, 0.987 -> 0.962 greedily; PPO with a critic: 0.900 at 0.320.

out_dir = 'out/grpo'
adv = 'grpo'
kl_coef = 0.1
