# Mixture of experts: 8 in each layer, of which a token goes through 2 half as wide as the MLP of the dense model, so
# that its active parameters and operations are those of the default run, which it should beat at equal tokens.
# python train.py config/course/moe.py
# python train.py --tokenizer=bpe --vocab_size=2048 --out_dir=out/dense
# python configurator.py out/dense out/moe
#
# Result of three seeds after --max_iters=300: 4.103, 4.106, 4.119 nats a token on the validation set, where the dense
# model has 4.153, 4.157, 4.155.

out_dir = 'out/moe'
tokenizer = 'bpe'
vocab_size = 2048
n_expert = 8
n_expert_active = 2
n_hidden = 256
moe_balance = 'aux'
