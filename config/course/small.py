# The model of the course's comparisons: two layers, 64 channels, four heads, bytes as tokens. A run
# takes about twenty seconds. What an experiment changes is in a second config file, and its
# variants are on the command line:
#
#     python train.py config/course/small.py
#     python train.py config/course/small.py config/course/norms.py --norm=layernorm \
#         --out_dir=out/layernorm
#
# Result of the first command: 2.042 nats (2.946 bits) per byte on the whole validation set, after
# 15 s on one core of a 2-core CPU with AVX-512. Half of the time is that evaluation.

out_dir = 'out/small'
tokenizer = 'byte'
n_layer = 2
n_embd = 64
block_size = 64
max_iters = 200
eval_interval = 50
sample_tokens = 0
