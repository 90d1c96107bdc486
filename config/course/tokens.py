eval_interval = 50
