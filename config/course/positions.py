# Where a token stands: an embedding learned for each position, sines and cosines added (arXiv 1706.03762), or RoPE
# (arXiv 2104.09864), which turns queries and keys so that scores know distances alone.
# for p in learned sinusoidal rope; do python train.py config/course/small.py config/course/positions.py --pos=$p --out_dir=out/$p; done
# python tests/bench_positions.py
#
# Result: 2.051 nats a byte with learned positions, 2.007 with sines, 1.901 with RoPE. Read on positions 64 to 255, where
# none was trained: learned ones have none there; sines 2.88 to 3.15; RoPE 1.95, rising to 2.33, and with a window of 32,
# in which no distance is new, 1.86 to 1.89, as at the trained length (1.87).

max_iters = 400
eval_interval = 100
