# The model of the course's comparisons, small enough that a run takes some twenty seconds: two layers, 64 channels, four
# heads, bytes. What an experiment changes stands in a second file, and its variants on the command line:
# python train.py config/course/small.py
# python train.py config/course/small.py config/course/norms.py --norm=layernorm --out_dir=out/layernorm
#
# Result: 2.073 nats a byte (2.990 bits) over all the held-out text, in 14 s on one core, of which half is that evaluation.

out_dir = 'out/small'
tokenizer = 'byte'
n_layer = 2
n_embd = 64
block_size = 64
max_iters = 200
eval_interval = 50
sample_tokens = 0
