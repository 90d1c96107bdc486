# nanoGPT's first example: GPT-2's architecture on tiny Shakespeare, with bytes as tokens, which for
# this text are its characters; for one GPU:
#
#     python train.py config/train_shakespeare_char.py
#
# A smaller version for a CPU:
#
#     python train.py config/train_shakespeare_char.py --device=cpu --compile=False \
#         --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 \
#         --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0
#
# Result of the latter: 1.879 nats per character on the whole validation set, after 98 s on a 2-core
# CPU with AVX2 (nanoGPT on the same machine: 98 s).

out_dir = 'out/shakespeare_char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False    # the model overfits this small text, so keep only the best

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
bias = False
norm = 'layernorm'
pos = 'learned'
mlp = 'gelu'
qk_norm = False
tie_weights = True

optimizer = 'adamw'
learning_rate = 1e-3
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.99                      # a step has few tokens, so average the second moment for longer
grad_clip = 1.0
max_iters = 5000
lr_schedule = 'cosine'
warmup_iters = 100
lr_decay_iters = 5000
min_lr = 1e-4
