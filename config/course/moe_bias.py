# Balancing without a loss (arXiv 2408.15664): config/course/moe.py with a bias in place of the
# load-balancing loss. The bias affects which experts are selected, not their weights, so it has no
# gradient. It moves by a small step after each training step, against the load of the experts.
#
#     python train.py config/course/moe_bias.py
#     python assets/draw.py out/moe out/moe_bias
#
# Result, one seed, after 300 steps (--max_iters=300): 4.096 nats per token. The busiest expert has
# 1.3 times an even load; with the load-balancing loss it has 2.1 to 3.1 times.

out_dir = 'out/moe_bias'
tokenizer = 'bpe'
vocab_size = 2048
n_expert = 8
n_expert_active = 2
n_hidden = 256
moe_balance = 'bias'
mlp = 'relu2'  # squared ReLU, with which the results above were measured
