# Mixture of experts: 8 in each layer, of which 2 are active for each token. An expert is half as
# wide as the MLP of the dense model (84 of 168), so the active parameters and operations are equal,
# except for the router's.
#
#     python train.py config/course/small.py --max_iters=400 --eval_interval=100 --out_dir=out/dense
#     python train.py config/course/small.py config/course/moe.py
#     python assets/draw.py out/dense out/moe --labels=dense,experts --metrics=val_loss \
#         --first=100 --out=out/compare.png
#
# Result: 1.813 nats per byte with 308,928 parameters. The dense model has 1.859 with 114,368.

out_dir = 'out/moe'
max_iters = 400
eval_interval = 100
n_expert = 8
n_expert_active = 2
n_hidden = 84
moe_balance = 'aux'
