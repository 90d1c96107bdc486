# SFT of SmolLM2 on 73 sums: it learns to answer "8 + 8 = 16".
#
#     python sft.py config/smollm2/sft.py
#
# Result on 27 held-out sums, before -> after: greedy exact match 0.04 -> 1.00, sampled 0.00 -> 0.99.
# 2 minutes of processor time on a CPU with AVX-512 and bfloat16, 3.6 GB of memory.

out_dir = 'out/smollm2-sft'
init_from = 'out/smollm2'
dataset = 'sums'
batch_size = 16
gradient_accumulation_steps = 1
max_new_tokens = 24
optimizer = 'adamw'    # the model was trained with AdamW, and needs only small steps
learning_rate = 2e-5
weight_decay = 0.0
max_iters = 20
warmup_iters = 2
eval_interval = 20
log_interval = 1
