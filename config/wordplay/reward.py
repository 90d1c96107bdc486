# The chain on wordplay, 3 of 4: an encoder learns from 72,000 pairs, of whose labels 10% are flipped, to tell right
# answers from wrong ones.
# python reward.py config/wordplay/reward.py
#
# Result:

out_dir = 'out/reward'
init_from = 'out/sft'
batch_size = 16       # small steps learn more from a pair, and every pair comes once
gradient_accumulation_steps = 1
eval_interval = 900
muon_lr = 0.005
center_weight = 0.02  # the scores of different prompts stay comparable
