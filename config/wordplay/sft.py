# The chain on wordplay, 2 of 4: it learns to answer from demonstrations of which 35% are wrong.
# python sft.py config/wordplay/sft.py
#
# Result, three seeds: 0.987, 0.990 and 0.994 of 1,000 held-out prompts right greedily, 0.645, 0.641 and 0.631 by sampling, where
# 0.65 of the demonstrations are; 7 minutes on the 2-core CPU with AVX2. Sums come all at once: in one run of the default seed
# too late, with 0.74 of them right and 0.953 of all prompts.

out_dir = 'out/sft'
init_from = 'out/bytes'
max_iters = 1200
batch_size = 32                  # of like length: a tenth less padding than two of 64
gradient_accumulation_steps = 4
compile = True                   # saves a fifth of a step, where there is a C++ compiler
learning_rate = 6e-3
muon_lr = 0.05
