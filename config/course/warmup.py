# Warm-up: the learning rate climbs to its top over some steps, or starts there. In AdamW's first steps
# each weight moves by nearly the whole learning rate, wherever the noise of a batch points; nothing is clipped here.
# for s in 1337 2 3; do python train.py config/course/small.py config/course/warmup.py --warmup_iters=0 --seed=$s --out_dir=out/cold-$s; done
# for s in 1337 2 3; do python train.py config/course/small.py config/course/warmup.py --warmup_iters=50 --seed=$s --out_dir=out/warm-$s; done
# python configurator.py out/cold-1337 out/cold-2 out/cold-3 out/warm-1337 out/warm-2 out/warm-3 --metrics=val_loss --first=25 --out=assets/warmup.png
#
# Result: without 2.362, 2.690 and 2.609 nats a byte (seeds 1337, 2, 3), with 50 steps of it 2.220, 2.267 and 2.276.
# Without it the run is ahead for 25 steps, then behind for good. It suffers, but it does not diverge, nor does it at
# --learning_rate=1e-2 (seed 1337: 2.611 without, 2.435 with it) or 3e-2 (2.759 and 2.673).

optimizer = 'adamw'
learning_rate = 5e-3
beta2 = 0.999
grad_clip = 0.0
qk_norm = False
eval_interval = 25
