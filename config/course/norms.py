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
#         out/rmsnorm-3e-2-1 --metrics=val_loss,grad_norm --first=10
#     python tests/bench_norm.py
#
# Result, in nats per byte:
#
# @@ as in the chapter

optimizer = 'adamw'
learning_rate = 3e-3
qk_norm = False
