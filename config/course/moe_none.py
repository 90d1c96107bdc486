# Experts without balancing: config/course/moe.py with neither a load-balancing loss nor a bias. The
# loads of each layer are drawn in curves.png: soon a few experts receive most of the tokens, and
# others almost none.
#
#     python train.py config/course/moe_none.py
#     python assets/draw.py out/moe out/moe_none
#
# Result of three seeds, validation loss in nats per token after 300 steps (--max_iters=300): 4.104,
# 4.105 and 4.109, no worse than with balancing (4.103, 4.106 and 4.119). At the end the busiest
# expert of a layer has 3.5 to 3.8 times an even load.

out_dir = 'out/moe_none'
tokenizer = 'bpe'
vocab_size = 2048
n_expert = 8
n_expert_active = 2
n_hidden = 256
moe_balance = 'none'
mlp = 'relu2'  # squared ReLU, with which the results above were measured
