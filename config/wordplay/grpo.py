# GRPO: four responses to each prompt; the advantage of each is its distance from their mean, in
# standard deviations; no critic (arXiv 2402.03300).
#
#     python ppo.py config/wordplay/grpo.py
#
# Result, default seed, before -> after, with the KL in nats per response; PPO with a critic for
# comparison:
#
#                                     GRPO              PPO
#     sampled exact match   0.646 -> 0.941   0.646 -> 0.958
#     greedy exact match    0.992 -> 0.995   0.992 -> 0.992
#     KL                             0.322            0.363

out_dir = 'out/grpo'
adv = 'grpo'
kl_coef = 0.1
