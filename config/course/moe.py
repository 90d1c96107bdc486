# Mixture of experts: 8 in each layer, of which a token goes through 2 half as wide as the MLP of the dense model, so
# that its active parameters and operations are those of the default run, which it should beat at equal tokens.
# python train.py config/course/moe.py
# python train.py --tokenizer=bpe --vocab_size=2048 --out_dir=out/dense
# python configurator.py out/dense out/moe
#
# Result of one seed (three to come): validation loss 4.466 nats a token after --max_iters=150, the dense model's 4.482;
# 4.001 and 4.031 after 400.

out_dir = 'out/moe'
tokenizer = 'bpe'
vocab_size = 2048
n_expert = 8
n_expert_active = 2
n_hidden = 256
moe_balance = 'aux'
