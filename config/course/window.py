# A sliding window: each layer sees the last `window` bytes alone, so two layers reach almost twice as far; and --n_sink=2
# keeps the first ones in sight.
# for w in 0 8 24; do python train.py config/course/small.py config/course/window.py --window=$w --out_dir=out/window-$w; done
# python configurator.py out/window-0 out/window-8 out/window-24 --metrics=val_loss --first=50
# python tests/bench_stream.py out/window-0 out/streaming.png
#
# Result: everything in sight (64 bytes) 1.901 nats a byte, a window of 24 1.865, of 8 1.856: so early in training what
# is near seems to be all that is used, and not having to find it helps. A text 100 times as long, read through a cache of
# 64: perplexity 6.23 with four sinks, 6.33 without, 6.30 where each byte is predicted from 64 read anew, 20.8 where nothing
# is dropped and distances are met that were never trained on.

max_iters = 400
eval_interval = 100
