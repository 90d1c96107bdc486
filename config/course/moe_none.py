# Experts left to themselves: moe.py with nothing that balances them. Each layer's shares are drawn in curves.png:
# some experts are soon sent most of the tokens, and others hardly any.
# python train.py config/course/moe_none.py
# python configurator.py out/moe out/moe_none
#
# Result of three seeds after --max_iters=300: 4.104, 4.105, 4.109, no worse than with the balancing loss; the busiest expert of a
# layer has 3.5 to 3.8 times an even share at the end.

out_dir = 'out/moe_none'
tokenizer = 'bpe'
vocab_size = 2048
n_expert = 8
n_expert_active = 2
n_hidden = 256
moe_balance = 'none'
