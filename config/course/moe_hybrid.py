# A hybrid: experts in every other layer, a dense MLP as wide as one of them in the others. The width is such that the
# active parameters are still those of the default run: of two layers 344 + 2 * 344, there 512 + 512.
# python train.py config/course/moe_hybrid.py
# python configurator.py out/moe out/moe_hybrid
#
# Result of three seeds after --max_iters=300: 4.094, 4.127, 4.098; experts in every layer: 4.103, 4.106, 4.119.

out_dir = 'out/moe_hybrid'
tokenizer = 'bpe'
vocab_size = 2048
n_expert = 8
n_expert_active = 2
n_hidden = 344
moe_every = 2
moe_balance = 'aux'
