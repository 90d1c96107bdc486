# The chain on wordplay, 3 of 4: an encoder learns from 30,000 pairs, of whose labels 10% are flipped, to tell right
# answers from wrong ones.
# python reward.py config/wordplay/reward.py
#
# Result, two seeds: accuracy on clean labels 0.882 and 0.860, AUC 0.94 and 0.90; 16 minutes on one core. Sums are not judged:
# their margin stays 0.

out_dir = 'out/reward'
init_from = 'out/sft'
max_iters = 1404      # every pair three times
eval_interval = 234
muon_lr = 0.008
center_weight = 0.02  # the scores of different prompts stay comparable
