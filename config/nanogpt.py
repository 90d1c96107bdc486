# The defaults of nanoGPT's train.py, so that a config file written for nanoGPT trains the same
# model with the same optimizer and schedule. Name it before that file:
#
#     python train.py config/nanogpt.py THEIR_CONFIG.py
#
# Alone it trains nanoGPT's default, GPT-2 (124M) on OpenWebText.
#
# Settings have the same names and meanings as in nanoGPT. What differs:
# - GPT-2's vocabulary has 50,257 rows, one per token. nanoGPT pads it to 50,304.
# - The tokenizer is the dataset's own default: GPT-2's for openwebtext, bytes for shakespeare_char
#   (a vocabulary of 261; nanoGPT numbers the 65 characters that occur). nanoGPT's `shakespeare` is
#   tiny Shakespeare in GPT-2 tokens; ours is another text with a tokenizer of its own, so add
#   --tokenizer=gpt2 to fine-tune a GPT-2 on it.
# - A model named by init_from keeps its own architecture, GPT-2's approximate GELU included.
# - The validation loss is measured on eval_iters batches that are the same at each evaluation, and
#   at the end on the whole validation set. nanoGPT draws random batches, of the training set too.
# - Random numbers are drawn differently, so losses agree only up to the noise between seeds.

# output
out_dir = 'out'
init_from = 'scratch'
eval_interval = 2000
log_interval = 1
eval_iters = 200
eval_only = False
always_save_checkpoint = True
sample_tokens = 0                 # nanoGPT prints no samples during training
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'

# data: 12 sequences of 1,024 tokens * 40 micro-batches = 491,520 tokens per step
dataset = 'openwebtext'
tokenizer = ''
vocab_size = 0
gradient_accumulation_steps = 5 * 8
batch_size = 12
block_size = 1024

# model: GPT-2's architecture without biases
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

# optimizer
optimizer = 'adamw'
learning_rate = 6e-4
max_iters = 600000
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

# learning-rate schedule; with decay_lr = False the rate is constant, without warm-up
decay_lr = True
lr_schedule = 'cosine'
warmup_iters = 2000
lr_decay_iters = 600000
min_lr = 6e-5

# machine: nanoGPT names 'cuda' here; 'auto' chooses it, and bfloat16, where they are available
backend = 'nccl'
device = 'auto'
dtype = 'auto'
compile = 'auto'
