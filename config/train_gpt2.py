# GPT-2 (124M) from scratch on OpenWebText, as nanoGPT trains it:
#
#     python data/openwebtext/prepare.py
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py --wandb_log=True
#
# nanoGPT reports a validation loss of about 2.85 nats per token after about four days on eight A100
# (40 GB). We have no such machine: data, bfloat16 and ranks were tested at smaller sizes on CPUs.

out_dir = 'out/gpt2'
eval_interval = 1000
eval_iters = 200
log_interval = 10
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

dataset = 'openwebtext'
tokenizer = 'gpt2'
# 12 sequences of 1,024 tokens * 40 micro-batches, over all ranks, make 491,520 tokens per step
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0
bias = False
norm = 'layernorm'
pos = 'learned'
mlp = 'gelu'
qk_norm = False
tie_weights = True

optimizer = 'adamw'
learning_rate = 6e-4
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
max_iters = 600000                # 300 billion tokens
lr_schedule = 'cosine'
warmup_iters = 2000
lr_decay_iters = 600000
min_lr = 6e-5

device = 'cuda'
dtype = 'bfloat16'
compile = True
