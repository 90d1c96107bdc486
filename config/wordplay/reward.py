# The chain on wordplay, 3 of 4: an encoder learns from 48,000 pairs, of whose labels 10% are flipped, to tell right
# answers from wrong ones.
# python reward.py config/wordplay/reward.py
#
# Result, three seeds: accuracy on clean labels 0.946, 0.936 and 0.943, and 0.988, 0.990 and 0.991 where one of the two answers
# is right, AUC 0.977, 0.981 and 0.980, calibration error 0.047, 0.034 and 0.033; 7 minutes on one core of the 2-core CPU with
# AVX-512.

out_dir = 'out/reward'
init_from = 'out/sft'
batch_size = 16       # small steps learn more from a pair, and every pair comes once
gradient_accumulation_steps = 1
length_groups = 4     # saves a fifth of a step
eval_interval = 1000
learning_rate = 2e-3
flip_rate = 0.1       # the share of labels that is turned round
center_weight = 0.01  # the scores of different prompts stay comparable
