# GRPO: four responses to each prompt; the advantage of each is its distance from their mean, in
# standard deviations; no critic (arXiv 2402.03300).
#
#     python ppo.py config/wordplay/grpo.py
#
# Result, one seed, before -> after, with the KL in nats per response; PPO with a critic for
# comparison:
#
#                                     GRPO              PPO
#     sampled exact match   0.646 -> 0.938   0.646 -> 0.947
#     greedy exact match    0.989 -> 0.983   0.989 -> 0.987
#     KL                             0.361            0.370

out_dir = 'out/grpo'
adv = 'grpo'
kl_coef = 0.1
