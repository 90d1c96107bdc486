# A hybrid: experts in every other layer, and in the ones between a dense MLP of the same width as an expert.
# python train.py config/course/moe_hybrid.py
# python configurator.py out/moe out/moe_hybrid
#
# Result: (three seeds to come)

out_dir = 'out/moe_hybrid'
n_expert = 8
n_expert_active = 2
n_hidden = 256
moe_every = 2
moe_balance = 'aux'
