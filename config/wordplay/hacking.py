# Over-optimisation, on purpose (arXiv 2210.10760): a reward model of few pairs and no KL penalty. The score rises while
# gold falls.
# python ppo.py config/wordplay/hacking.py
#
# Result of 50 iterations: score 0.10 -> 0.16, gold 0.63 -> 0.33, greedily right 0.99 -> 0.63, KL 1.5; 8 minutes on a busy core.

out_dir = 'out/hacking'
reward_model = 'out/reward_few'
kl_control = 'none'
max_iters = 50
