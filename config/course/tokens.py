# Bytes and BPE (arXiv 1508.07909), compared in bits per byte, because their tokens are not of the
# same length. Steps, tokens per step and blocks are the same. With longer tokens, the model reads
# more text and has a larger embedding.
#
#     python train.py config/course/small.py config/course/tokens.py --tokenizer=byte \
#         --out_dir=out/byte
#     for v in 512 2048; do
#         python train.py config/course/small.py config/course/tokens.py --tokenizer=bpe \
#             --vocab_size=$v --out_dir=out/bpe-$v
#     done
#     python assets/draw.py out/byte out/bpe-512 out/bpe-2048 --metrics=val_bpb --first=50
#
# Result, with squared ReLU in the MLP; to be measured again:
#
#     tokens          bits per byte   parameters
#     bytes                   2.990      115,392
#     BPE, 512                2.774      131,456
#     BPE, 2,048              2.564      229,760

max_iters = 200
