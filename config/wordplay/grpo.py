# GRPO: four answers to each prompt, each against their mean, in units of their spread; no critic (arXiv 2402.03300).
# python ppo.py config/wordplay/grpo.py

out_dir = 'out/grpo'
adv = 'grpo'
kl_coef = 0.1
