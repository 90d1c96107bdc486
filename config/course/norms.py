# LayerNorm and RMSNorm (arXiv 1910.07467), with AdamW and without a norm on queries and keys.
#
#     for n in layernorm rmsnorm; do for s in 1 2 3; do
#         python train.py config/course/small.py config/course/norms.py --norm=$n --seed=$s \
#             --out_dir=out/$n-$s
#     done; done
#     python assets/draw.py out/layernorm-1 out/layernorm-2 out/layernorm-3 \
#         out/rmsnorm-1 out/rmsnorm-2 out/rmsnorm-3 --metrics=val_loss --first=50 \
#         --out=norms.png
#     python tests/bench_norm.py
#
# Result, in nats per byte:
#
#     seed                                  1       2       3
#     LayerNorm                         2.300   2.270   2.398
#     RMSNorm                           2.290   2.288   2.342
#     LayerNorm, learning_rate 1e-3     2.571
#     RMSNorm,   learning_rate 1e-3     2.564
#     LayerNorm, learning_rate 1e-2     2.460
#     RMSNorm,   learning_rate 1e-2     2.522
#
# The two norms differ by less than the seeds do.
#
# Gradient norms of the embedding and of the two blocks:
#
#                   LayerNorm            RMSNorm
#     untrained     1.18, 0.83, 0.82     1.18, 0.82, 0.81
#     trained       0.21, 0.36, 0.05     0.21, 0.31, 0.05
#
# Forward and backward take 1.06 times as long with RMSNorm: it needs fewer sums, but that saves no
# time on this CPU.

optimizer = 'adamw'
learning_rate = 3e-3
qk_norm = False
