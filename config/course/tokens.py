# Bytes and BPE (arXiv 1508.07909), compared in bits a byte, for a token of one is not a token of the other. Steps, tokens a
# step and the blocks of the model are the same; with longer tokens it reads more text and has a larger embedding.
# python train.py config/course/small.py config/course/tokens.py --tokenizer=byte --out_dir=out/byte
# for v in 512 2048; do python train.py config/course/small.py config/course/tokens.py --tokenizer=bpe --vocab_size=$v --out_dir=out/bpe-$v; done
# python configurator.py out/byte out/bpe-512 out/bpe-2048 --metrics=val_bpb --first=50
#
# Result: 2.990 bits a byte with bytes, 2.774 with 512 tokens, 2.564 with 2,048 (115,392, 131,456 and 229,760 parameters).

max_iters = 200
