# The small model, trained for longer, to draw what its eight attention heads look at. A minute on
# one core.
#
#     python train.py config/course/small.py config/course/attention.py
#     python assets/draw_attention.py --out_dir=out/attention
#
# Result: 1.719 nats per byte. In the first layer, heads attend to the byte itself (head 3: weight
# 0.74) or to the previous byte (heads 0 and 1: 0.41 and 0.45). In the second layer, head 3 attends
# to the blank before a word, and head 2 reaches furthest, 4.0 bytes on average.

out_dir = 'out/attention'
max_iters = 1000
eval_interval = 500
