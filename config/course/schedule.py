# How the learning rate falls: by a cosine (arXiv 1608.03983), in a line, not before the last fifth (wsd, arXiv 2405.18392),
# or not at all.
# for l in cosine linear wsd constant; do python train.py config/course/small.py config/course/schedule.py --lr_schedule=$l --out_dir=out/$l; done
# python configurator.py out/cosine out/linear out/wsd out/constant --metrics=lr,val_loss --first=50
#
# Result: cosine 2.096, linear 2.073, wsd 2.055, constant 2.103 nats a byte.

eval_interval = 25
