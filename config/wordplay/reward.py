# Wordplay, stage 3 of 4: a reward model, an encoder trained on 48,000 pairs. 10% of their labels
# are flipped.
#
#     python reward.py config/wordplay/reward.py
#
# Result on 2,000 held-out pairs:
#
#     seed                                      1       2       3
#     accuracy on clean labels              0.946   0.936   0.943
#     accuracy if one response is correct   0.988   0.990   0.991
#     AUC                                   0.977   0.981   0.980
#     calibration error                     0.047   0.034   0.033
#
# Seven minutes on one core of a 2-core CPU with AVX-512.

out_dir = 'out/reward'
init_from = 'out/sft'
batch_size = 16       # one epoch only: small batches give more steps
gradient_accumulation_steps = 1
length_groups = 4     # less padding saves a fifth of the time of a step
eval_interval = 1000
learning_rate = 2e-3
flip_rate = 0.1       # the share of the labels that is flipped
center_weight = 0.01  # keeps the scores of different prompts comparable
