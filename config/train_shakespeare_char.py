# nanoGPT's first model: GPT-2's architecture on tiny Shakespeare, characters as tokens; for one GPU.
# python train.py config/train_shakespeare_char.py
#
# The same on a CPU, smaller:
# python train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 \
#   --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0
# which gave a whole-validation loss of 1.879 nats a character in 98 s on a 2-core CPU with AVX2 (nanoGPT beside it: 98 s).

out_dir = 'out/shakespeare_char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # this small a text is soon learned by heart: keep the best

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
norm = 'layernorm'
pos = 'learned'
mlp = 'gelu'
qk_norm = False

optimizer = 'adamw'
learning_rate = 1e-3
beta2 = 0.99  # few tokens a step: a longer memory for the second moment
weight_decay = 0.1
max_iters = 5000
lr_schedule = 'cosine'
lr_decay_iters = 5000
min_lr = 1e-4
warmup_iters = 100
