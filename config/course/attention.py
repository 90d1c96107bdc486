# Heads to look at: the small model, trained longer, and maps of what its eight heads look at.
# python train.py config/course/small.py config/course/attention.py
# python assets/attention.py --out_dir=out/attention
#
# Result: 1.744 nats a byte after 40 s on one core. In the first layer the heads look at a byte itself or at the one
# before (head 2: 0.45 and 0.44 of the weight); in the second they look
# further back, head 0 the furthest, 3.6 bytes on average.

out_dir = 'out/attention'
max_iters = 1000
eval_interval = 500
