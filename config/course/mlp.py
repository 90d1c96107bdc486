n_embd = 96
