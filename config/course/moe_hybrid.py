# A hybrid: experts in every other layer, and in the other layers a dense MLP of the width of one
# expert. The width keeps the active parameters of the dense model: in two layers 112 + 2 * 112
# hidden units, instead of 168 + 168.
#
#     python train.py config/course/small.py config/course/moe_hybrid.py
#     python assets/draw.py out/moe out/moe_hybrid
#
# Result: @@ as in the chapter

out_dir = 'out/moe_hybrid'
max_iters = 400
eval_interval = 100
n_expert = 8
n_expert_active = 2
n_hidden = 112
moe_every = 2
moe_balance = 'aux'
