# Over-optimisation on purpose (arXiv 2210.10760): a reward model trained on few pairs, and no KL
# penalty. The score rises while gold, the share of correct responses, falls.
#
#     python ppo.py config/wordplay/hacking.py
#
# It needs out/sft and out/reward_few, made with config/wordplay/sft.py and
# config/wordplay/reward_few.py.
#
# Result of 70 iterations, in 4 minutes on one core:
#
#     score                     0.1  -> 1.4
#     gold                      0.62 -> 0.02
#     KL, nats per response     43
#
# In the end the responses look like "mbbmmbmms" where "cbuufsfe" is correct. The 400 pairs contain
# nothing that would lower the score of such a response.

out_dir = 'out/hacking'
reward_model = 'out/reward_few'
kl_control = 'none'
max_iters = 70
