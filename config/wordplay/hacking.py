# Over-optimisation, on purpose (arXiv 2210.10760): a reward model of few pairs and no KL penalty. The score rises while
# gold falls.
# python ppo.py config/wordplay/hacking.py
#
# Result of 70 iterations: score -0.1 -> 0.6, gold 0.62 -> 0.10, KL 20 nats an answer; 6 minutes on one core. Most answers end up
# like "ssffsie ssofsise" where "suffice suffice" was right, which 400 pairs never taught the judge to dislike.

out_dir = 'out/hacking'
reward_model = 'out/reward_few'
kl_control = 'none'
max_iters = 70
