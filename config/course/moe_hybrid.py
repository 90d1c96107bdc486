# A hybrid: experts in every other layer, and in the other layers a dense MLP of the width of one
# expert. The width keeps the active parameters of the dense model: in two layers 112 + 2 * 112
# hidden units, instead of 168 + 168.
#
#     python train.py config/course/small.py config/course/moe_hybrid.py
#     python assets/draw.py out/dense out/moe out/moe_hybrid --labels=dense,experts,hybrid \
#         --metrics=val_loss,moe_imbalance --first=100 --out=out/moe.png
#
# Result: 1.830 nats per byte with 243,904 parameters, between the dense model (1.859, 114,368) and
# experts in both layers (1.813, 308,928).

out_dir = 'out/moe_hybrid'
max_iters = 400
eval_interval = 100
n_expert = 8
n_expert_active = 2
n_hidden = 112
moe_every = 2
moe_balance = 'aux'
