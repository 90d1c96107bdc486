# Gradient accumulation and mixed precision: a step on 16 sequences at once, or on four
# micro-batches of 4 whose gradients are added. The step is the same. The third run multiplies in
# bfloat16.
#
#     python train.py config/course/small.py config/course/accumulation.py --out_dir=out/one
#     python train.py config/course/small.py config/course/accumulation.py --batch_size=4 \
#         --gradient_accumulation_steps=4 --out_dir=out/four
#     python train.py config/course/small.py config/course/accumulation.py --dtype=bfloat16 \
#         --out_dir=out/bfloat16
#     python assets/draw.py out/one out/four out/bfloat16 --metrics=loss,grad_norm
#
# Result, in nats per byte after 50 steps: 2.5892061 at once, 2.5892060 with four micro-batches,
# 2.5889988 in bfloat16.

max_iters = 50
log_interval = 1
dtype = 'float32'
