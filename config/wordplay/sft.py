# The chain on wordplay, 2 of 4: it learns to answer from demonstrations of which 35% are wrong.
# python sft.py config/wordplay/sft.py

out_dir = 'out/sft'
init_from = 'out/bytes'
max_iters = 1200
learning_rate = 6e-3
muon_lr = 0.04
