# LayerNorm and RMSNorm (arXiv 1910.07467), in the plain architecture: AdamW, and no norm on queries and keys.
# for n in layernorm rmsnorm; do for s in 1 2 3; do python train.py config/course/small.py config/course/norms.py --norm=$n --seed=$s --out_dir=out/$n-$s; done; done
# python configurator.py out/layernorm-1 out/layernorm-2 out/layernorm-3 out/rmsnorm-1 out/rmsnorm-2 out/rmsnorm-3 --metrics=val_loss --first=50 --out=assets/norms.png
# python tests/bench_norm.py
#
# Result: with LayerNorm 2.300, 2.270 and 2.398 nats a byte (seeds 1, 2, 3), with RMSNorm 2.290, 2.288 and 2.342: no
# difference that seeds do not make as well. Other learning rates, seed 1, are worse for both: --learning_rate=1e-3 ends
# at 2.571 and 2.564, 1e-2 at 2.460 and 2.522.
# Gradient norms of embedding, first and second block: at the start 1.18, 0.83, 0.82 with LayerNorm and 1.18, 0.82, 0.81 with
# RMSNorm; trained, 0.21, 0.36, 0.05 and 0.21, 0.31, 0.05. Forward and backward take 1.06 times as long with RMSNorm, which
# saves sums but no time on this CPU.

optimizer = 'adamw'
learning_rate = 3e-3
qk_norm = False
