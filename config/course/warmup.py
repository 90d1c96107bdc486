# Warm-up: the learning rate rises to its peak over some steps, or starts at the peak. In the first
# steps of AdamW, each weight moves by almost the whole learning rate, whatever the noise in the
# gradient. Gradients are not clipped here.
#
#     for s in 1337 2 3; do
#         python train.py config/course/small.py config/course/warmup.py --warmup_iters=0 \
#             --seed=$s --out_dir=out/cold-$s
#         python train.py config/course/small.py config/course/warmup.py --warmup_iters=50 \
#             --seed=$s --out_dir=out/warm-$s
#     done
#     python assets/draw.py out/cold-1337 out/cold-2 out/cold-3 out/warm-1337 out/warm-2 \
#         out/warm-3 --metrics=val_loss --first=25 --out=warmup.png
#
# Result, in nats per byte, with squared ReLU in the MLP; to be measured again:
#
#     seed                                  1337       2       3
#     no warm-up                           2.362   2.690   2.609
#     50 steps of warm-up                  2.220   2.267   2.276
#     no warm-up, learning_rate 1e-2       2.611
#     50 steps, learning_rate 1e-2         2.435
#     no warm-up, learning_rate 3e-2       2.759
#     50 steps, learning_rate 3e-2         2.673
#
# Without warm-up, the loss is lower for 25 steps and higher from then on. No run diverges.

optimizer = 'adamw'
learning_rate = 5e-3
beta2 = 0.999
grad_clip = 0.0
qk_norm = False
eval_interval = 25
