# Sixteen sequences a step at once, or in four parts whose gradients add up: the same step in less memory, in more time.
# And half precision, where the hardware multiplies in it; where it does not, it is emulated and slow.
# python train.py config/course/small.py config/course/accumulation.py --out_dir=out/one
# python train.py config/course/small.py config/course/accumulation.py --batch_size=4 --gradient_accumulation_steps=4 --out_dir=out/four
# python train.py config/course/small.py config/course/accumulation.py --dtype=bfloat16 --out_dir=out/bfloat16
# python configurator.py out/one out/four out/bfloat16 --metrics=loss,val_loss
#
# Result: 2.5708699 nats a byte at once, 2.5708698 in four parts, 2.5694 in bfloat16, whose run, on a CPU that has no
# bfloat16, took 40 s where float32 took 7.

max_iters = 50
