# Balance without a loss (arXiv 2408.15664): moe.py, where a bias on the choice of experts, moved a little after each
# step against their loads, takes the place of the balancing loss. The gates, and so the gradients, know nothing of it.
# python train.py config/course/moe_bias.py
# python configurator.py out/moe out/moe_bias
#
# Result: (three seeds to come)

out_dir = 'out/moe_bias'
n_expert = 8
n_expert_active = 2
n_hidden = 256
moe_balance = 'bias'
