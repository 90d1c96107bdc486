# RLOO: four responses to each prompt, each compared with the mean of the other three; no critic
# (arXiv 2402.14740).
#
#     python ppo.py config/wordplay/rloo.py
#
# Result, one seed, before -> after, with the KL in nats per response; PPO with a critic for
# comparison:
#
#                                     RLOO              PPO
#     sampled exact match   0.646 -> 0.936   0.646 -> 0.947
#     greedy exact match    0.989 -> 0.978   0.989 -> 0.987
#     KL                             0.360            0.370

out_dir = 'out/rloo'
adv = 'rloo'
kl_coef = 0.1
