# The small model, trained for longer, to draw what its eight attention heads look at. A minute on
# one core.
#
#     python train.py config/course/small.py config/course/attention.py
#     python assets/draw_attention.py --out_dir=out/attention
#
# Result: 1.701 nats per byte. In the first layer, heads attend to the byte itself (head 2: weight
# 0.65) or to the previous byte (head 3: 0.42). In the second layer, head 2 reaches furthest: to the
# last comma, 3.4 bytes on average.

out_dir = 'out/attention'
max_iters = 1000
eval_interval = 500
