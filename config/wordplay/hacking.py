# Over-optimisation, on purpose (arXiv 2210.10760): a reward model of few pairs and no KL penalty. The score rises while
# gold falls.
# python ppo.py config/wordplay/hacking.py
#
# Result of 70 iterations: score 0.0 -> 0.9, gold 0.63 -> 0.03, KL 31 nats an answer; 4 minutes on one core. Answers end up like
# "fffffffff" where "cbuufsfe" was right, which 400 pairs never taught the judge to dislike.

out_dir = 'out/hacking'
reward_model = 'out/reward_few'
kl_control = 'none'
max_iters = 70
