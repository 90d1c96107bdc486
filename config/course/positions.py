# Position encodings: a learned embedding of each position, sines and cosines (arXiv 1706.03762),
# and RoPE (arXiv 2104.09864), which rotates queries and keys so that attention scores depend on the
# distance only.
#
#     for p in learned sinusoidal rope; do
#         python train.py config/course/small.py config/course/positions.py --pos=$p \
#             --out_dir=out/$p
#     done
#     python tests/bench_positions.py out/learned out/sinusoidal out/rope out/positions.png
#
# Result, in nats per byte. The model was trained on positions 0 to 63:
#
#                                validation loss    at positions 64 to 255
#     learned                              1.994    none: there is no embedding
#     sinusoidal                           1.997    2.59, rising to 3.08
#     RoPE                                 1.859    1.88, rising to 2.23
#     RoPE with a window of 32                      1.81 to 1.85
#
# With the window no distance is new, and the loss stays as it was at the trained length (1.82).

max_iters = 400
eval_interval = 100
