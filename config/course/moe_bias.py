# Balance without a loss (arXiv 2408.15664): moe.py, where a bias on the choice of experts, moved a little after each
# step against their loads, takes the place of the balancing loss. The gates, and so the gradients, know nothing of it.
# python train.py config/course/moe_bias.py
# python configurator.py out/moe out/moe_bias
#
# Result of one seed after --max_iters=300: 4.096, the busiest expert at 1.3 times an even share, where the balancing loss left it
# at 2.1 to 3.1 times.

out_dir = 'out/moe_bias'
tokenizer = 'bpe'
vocab_size = 2048
n_expert = 8
n_expert_active = 2
n_hidden = 256
moe_balance = 'bias'
