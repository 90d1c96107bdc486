optimizer = 'adamw'
learning_rate = 1e-2
qk_norm = False
