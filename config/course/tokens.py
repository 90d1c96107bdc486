# Bytes and BPE (arXiv 1508.07909), compared in bits per byte, because their tokens are not of the
# same length. Steps, tokens per step and blocks are the same. With longer tokens, the model reads
# more text and has a larger embedding.
#
#     python train.py config/course/small.py config/course/tokens.py --tokenizer=byte \
#         --out_dir=out/byte
#     for v in 512 1024 2048 4096; do
#         python train.py config/course/small.py config/course/tokens.py --vocab_size=$v \
#             --tokenizer=bpe --out_dir=out/bpe-$v
#     done
#     python assets/draw_merges.py --out=out/merges.png \
#         --runs=out/byte,out/bpe-512,out/bpe-1024,out/bpe-2048,out/bpe-4096
#
# Result:
#
#     tokens          bits per byte   parameters
#     bytes                   2.946      114,368
#     BPE, 512                2.744      130,432
#     BPE, 1,024              2.660      163,200
#     BPE, 2,048              2.556      228,736
#     BPE, 4,096              2.488      359,808

max_iters = 200
