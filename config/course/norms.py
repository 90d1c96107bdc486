# LayerNorm and RMSNorm (arXiv 1910.07467) at four learning rates of AdamW, without the norm on
# queries and keys, which would hide differences.
#
#     for n in layernorm rmsnorm; do
#         for l in 1e-3 3e-3 1e-2 3e-2; do
#             python train.py config/course/small.py config/course/norms.py --norm=$n \
#                 --learning_rate=$l --seed=1 --out_dir=out/$n-$l-1
#         done
#     done
#     python assets/draw.py out/layernorm-1e-3-1 out/rmsnorm-1e-3-1 out/layernorm-3e-3-1 \
#         out/rmsnorm-3e-3-1 out/layernorm-1e-2-1 out/rmsnorm-1e-2-1 out/layernorm-3e-2-1 \
#         out/rmsnorm-3e-2-1 --metrics=val_loss,grad_norm --first=10 --out=out/norms.png
#     python tests/bench_norm.py
#
# Result, in nats per byte:
#
#     learning_rate    LayerNorm    RMSNorm
#     1e-3                 2.709      2.723
#     3e-3                 2.588      2.598
#     1e-2                 2.478      2.552
#     1e-2, seed 2         2.614      2.512
#     3e-2                 2.598      2.549
#
# The norms differ by less than the seeds do. Forward and backward take 1.12 to 1.16 times as long
# with RMSNorm, which PyTorch puts together from several functions on a CPU.

optimizer = 'adamw'
learning_rate = 3e-3
qk_norm = False
