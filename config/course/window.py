# A sliding window: each layer sees only the last `window` bytes, so two layers together reach
# almost twice as far. --n_sink=2 keeps the first two bytes visible.
#
#     for w in 0 8 24; do
#         python train.py config/course/small.py config/course/window.py --window=$w \
#             --out_dir=out/window-$w
#     done
#     python assets/draw.py out/window-0 out/window-8 out/window-24 --metrics=val_loss --first=50
#     python tests/bench_stream.py out/window-0 out/streaming.png
#
# Result, in nats per byte: 1.901 with all 64 bytes visible, 1.865 with a window of 24, 1.856 with a
# window of 8. So early in training, the model seems to use nearby bytes only.
#
# Perplexity on a text 100 times as long as the context, read through a cache of 64 bytes:
#
#     four sinks                                            6.23
#     no sinks                                              6.33
#     no cache: each byte from 64 bytes that are read anew  6.30
#     nothing dropped: distances beyond those of training   20.8

max_iters = 400
eval_interval = 100
