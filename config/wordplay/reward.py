# The chain on wordplay, 3 of 4: an encoder learns from 30,000 pairs, of whose labels 10% are flipped, to tell right
# answers from wrong ones.
# python reward.py config/wordplay/reward.py

out_dir = 'out/reward'
init_from = 'out/sft'
max_iters = 1404      # every pair three times
eval_interval = 234
muon_lr = 0.008
center_weight = 0.02  # the scores of different prompts stay comparable
