# Router collapse: 8 experts per layer, of which each token uses one, without balancing. Within ten
# steps one expert of the second layer gets all tokens, and it keeps nearly all. Two cures: a
# load-balancing loss, and a bias that moves against the load.
#
#     for b in none aux bias; do
#         python train.py config/course/small.py config/course/collapse.py --moe_balance=$b \
#             --out_dir=out/collapse-$b
#     done
#     python assets/draw.py out/collapse-none out/collapse-aux out/collapse-bias \
#         --metrics=moe/layer_1 --out=out/experts.png
#
# Result, with the share of the busiest expert at the end, in the first and in the second layer:
#
#     none    2.058 nats per byte    58%    98%
#     loss    2.041                  20%    25%
#     bias    2.027                  14%    14%
#
# The dense model, config/course/small.py alone, has 2.042.

n_expert = 8
n_expert_active = 1
moe_balance = 'none'
moe_z_weight = 0.0
