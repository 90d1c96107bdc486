# Over-optimisation, on purpose (arXiv 2210.10760): a reward model of few pairs and no KL penalty. The score rises while
# gold falls.
# python ppo.py config/wordplay/hacking.py
#
# Result of 70 iterations: score 0.1 -> 1.4, gold 0.62 -> 0.02, KL 43 nats an answer; 4 minutes on one core. Answers end up like
# "mbbmmbmms" where "cbuufsfe" was right, which 400 pairs never taught the judge to dislike.

out_dir = 'out/hacking'
reward_model = 'out/reward_few'
kl_control = 'none'
max_iters = 70
