eval_interval = 25
