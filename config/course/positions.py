max_iters = 400
eval_interval = 100
