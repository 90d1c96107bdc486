# The chain on wordplay, 2 of 4: it learns to answer from demonstrations of which 35% are wrong.
# python sft.py config/wordplay/sft.py
#
# Result, three seeds: 0.989, 0.991 and 0.990 of 1,000 held-out prompts right greedily, 0.637, 0.635 and 0.646 by sampling, where
# 0.65 of the demonstrations are, and every sum; 6 minutes on one core of the 2-core CPU with AVX-512.

out_dir = 'out/sft'
init_from = 'out/bytes'
max_iters = 1200
batch_size = 32                  # of like length: a tenth less padding than two of 64
gradient_accumulation_steps = 4
learning_rate = 8e-3
