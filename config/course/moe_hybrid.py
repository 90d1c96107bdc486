# A hybrid: experts in every other layer, and in the other layers a dense MLP of the width of one
# expert. The width keeps the active parameters of the dense model: in two layers 344 + 2 * 344
# hidden units, instead of 512 + 512. (This holds for squared ReLU, with which the figures were
# measured.)
#
#     python train.py config/course/moe_hybrid.py
#     python assets/draw.py out/moe out/moe_hybrid
#
# Result, validation loss in nats per token after 300 steps (--max_iters=300):
#
#     seed                        1       2       3
#     every other layer       4.094   4.127   4.098
#     every layer (moe.py)    4.103   4.106   4.119

out_dir = 'out/moe_hybrid'
tokenizer = 'bpe'
vocab_size = 2048
n_expert = 8
n_expert_active = 2
n_hidden = 344
moe_every = 2
moe_balance = 'aux'
mlp = 'relu2'  # squared ReLU, with which the results above were measured
