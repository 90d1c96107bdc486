# The chain on wordplay, 3 of 4: an encoder learns from 57,000 pairs, of whose labels 10% are flipped, to tell right
# answers from wrong ones.
# python reward.py config/wordplay/reward.py
#
# Result, three seeds: accuracy on clean labels 0.950, 0.945 and 0.945, and 0.991, 0.994 and 0.987 where one of the two answers is
# right, AUC 0.988, 0.985 and 0.982, calibration error 0.037, 0.033 and 0.045; 15 minutes on one core of the 2-core CPU with AVX2.

out_dir = 'out/reward'
init_from = 'out/sft'
batch_size = 16       # small steps learn more from a pair, and every pair comes once
gradient_accumulation_steps = 1
length_groups = 4     # saves a fifth of a step
compile = True        # an eighth, where there is a C++ compiler
eval_interval = 1250
muon_lr = 0.005
flip_rate = 0.1       # the share of labels that is turned round
center_weight = 0.01  # the scores of different prompts stay comparable
