# Mixture of experts: 8 in each layer, of which 2 are active for each token. An expert is half as
# wide as the MLP of the dense model, so the active parameters and operations are equal. (This holds
# for squared ReLU, with which the figures were measured and whose default width is 512.)
#
#     python train.py config/course/moe.py
#     python train.py --tokenizer=bpe --vocab_size=2048 --out_dir=out/dense
#     python assets/draw.py out/dense out/moe
#
# Result, validation loss in nats per token after 300 steps (--max_iters=300):
#
#     seed           1       2       3
#     experts    4.103   4.106   4.119
#     dense      4.153   4.157   4.155

out_dir = 'out/moe'
tokenizer = 'bpe'
vocab_size = 2048
n_expert = 8
n_expert_active = 2
n_hidden = 256
moe_balance = 'aux'
mlp = 'relu2'  # squared ReLU, with which the results above were measured
