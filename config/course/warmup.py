optimizer = 'adamw'
learning_rate = 3e-2
beta2 = 0.999
grad_clip = 0.0
qk_norm = False
eval_interval = 25
