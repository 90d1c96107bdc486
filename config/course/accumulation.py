max_iters = 50
