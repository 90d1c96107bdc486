# A sliding window: each layer sees only the last `window` bytes, so two layers together reach
# almost twice as far. --n_sink=2 keeps the first two bytes visible.
#
#     python train.py config/course/small.py config/course/positions.py --pos=rope --out_dir=out/rope
#     for w in 8 24; do
#         python train.py config/course/small.py config/course/window.py --window=$w \
#             --out_dir=out/window-$w
#     done
#     python assets/draw.py out/rope out/window-8 out/window-24 --metrics=val_loss --first=100 \
#         --out=out/windows.png
#     python tests/bench_stream.py out/rope out/streaming.png
#
# Result, in nats per byte:
#
#     window                seed 1337   seed 2
#     8                         1.825    1.832
#     24                        1.840
#     64, all that it sees      1.859    1.859
#
# Early in training nearby bytes are what matters, and a window costs nothing.

max_iters = 400
eval_interval = 100
