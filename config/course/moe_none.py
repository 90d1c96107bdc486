# Experts left to themselves: moe.py with nothing that balances them. Each layer's shares are drawn in curves.png:
# some experts are soon sent most of the tokens, and others hardly any.
# python train.py config/course/moe_none.py
# python configurator.py out/moe out/moe_none
#
# Result of one seed: 4.464 after --max_iters=150, no worse than with the balancing loss (4.466).

out_dir = 'out/moe_none'
tokenizer = 'bpe'
vocab_size = 2048
n_expert = 8
n_expert_active = 2
n_hidden = 256
moe_balance = 'none'
