# The chain on wordplay, 3 of 4: an encoder learns from 48,000 pairs, of whose labels 10% are flipped, to tell right
# answers from wrong ones.
# python reward.py config/wordplay/reward.py
#
# Result, three seeds: accuracy on clean labels 0.942, 0.941 and 0.942, and 0.989, 0.987 and 0.990 where one of the two answers is
# right, AUC 0.976, 0.974 and 0.975, calibration error 0.036, 0.035 and 0.041; 15 minutes on one core of the 2-core CPU with AVX2.

out_dir = 'out/reward'
init_from = 'out/sft'
batch_size = 16       # small steps learn more from a pair, and every pair comes once
gradient_accumulation_steps = 1
length_groups = 4     # saves a fifth of a step
eval_interval = 1000
learning_rate = 2e-3
flip_rate = 0.1       # the share of labels that is turned round
center_weight = 0.01  # the scores of different prompts stay comparable
