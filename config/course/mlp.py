# GELU and SwiGLU (arXiv 2002.05202) with equally many parameters: with 96 channels, the MLP is two
# matrices of 96 x 384 or three of 96 x 256.
#
#     for m in gelu swiglu; do for s in 1 2; do
#         python train.py config/course/small.py config/course/mlp.py --mlp=$m --seed=$s \
#             --out_dir=out/$m-$s
#     done; done
#     python assets/draw.py out/gelu-1 out/gelu-2 out/swiglu-1 out/swiglu-2 --metrics=val_loss \
#         --first=50 --out=out/mlp.png
#
# Result, in nats per byte, both with 246,816 parameters:
#
#     seed         1       2
#     GELU     1.932   1.928
#     SwiGLU   1.930   1.935
#
# With a model this small and 200 steps, the gate gains nothing.

n_embd = 96
