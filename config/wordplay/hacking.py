# Over-optimisation, on purpose (arXiv 2210.10760): a reward model of few pairs and no KL penalty. The score rises while
# gold falls.
# python ppo.py config/wordplay/hacking.py

out_dir = 'out/hacking'
reward_model = 'out/reward_few'
kl_control = 'none'
