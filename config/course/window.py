# A sliding window: each layer sees only the last `window` bytes, so two layers together reach
# almost twice as far. --n_sink=2 keeps the first two bytes visible.
#
#     python train.py config/course/small.py config/course/positions.py --pos=rope --out_dir=out/rope
#     for w in 8 24; do
#         python train.py config/course/small.py config/course/window.py --window=$w \
#             --out_dir=out/window-$w
#     done
#     python assets/draw.py out/rope out/window-8 out/window-24 --metrics=val_loss --first=100
#     python tests/bench_stream.py out/rope out/streaming.png
#
# Result, in nats per byte: @@ as in the chapter

max_iters = 400
eval_interval = 100
