# GELU and SwiGLU (arXiv 2002.05202) at equal parameters: with 96 channels the MLP is 2 matrices of 96 x 384 or 3 of 96 x 256.
# for m in gelu swiglu; do for s in 1 2 3; do python train.py config/course/small.py config/course/mlp.py --mlp=$m --seed=$s --out_dir=out/$m-$s; done; done
# python configurator.py out/gelu-1 out/gelu-2 out/gelu-3 out/swiglu-1 out/swiglu-2 out/swiglu-3 --metrics=val_loss --first=50
#
# Result: with GELU 1.961, 1.944 and 1.960 nats a byte (seeds 1, 2, 3), with SwiGLU 1.961, 1.968 and 1.967, both of
# 246,816 parameters: at this size and in 200 steps the gate gains nothing.

n_embd = 96
