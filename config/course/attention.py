# The small model, trained for longer, to draw what its eight attention heads look at.
#
#     python train.py config/course/small.py config/course/attention.py
#     python assets/draw_attention.py --out_dir=out/attention
#
# Result: 1.744 nats per byte after 40 s on one core. In the first layer, heads attend to the byte
# itself or to the previous byte (head 2: weights 0.45 and 0.44). In the second layer they attend to
# bytes further back; head 0 reaches furthest, 3.6 bytes on average.

out_dir = 'out/attention'
max_iters = 1000
eval_interval = 500
