"""
How fast bpe.py trains, encodes and decodes, beside Hugging Face's tokenizers in the same run:

    python tests/bench_bpe.py [FILE]

Their trainer is timed twice: with the whole text at once, and with lines, which it splits on all
cores (ours uses one). It orders the bytes in another way, so that pairs with the same count may be
merged in another order. A few tokens then differ.
"""
import os
import sys
import tempfile
import time

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import bpe

VOCAB_SIZE = 4096


def timed(call, repeats=1):
    """The result of a call, and the seconds of the fastest of its repeats."""
    best = float('inf')
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - start)
    return result, best


def train_theirs(texts, vocab_size):
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False)
    theirs.train_from_iterator(texts, trainer)
    return theirs


def open_in_theirs(ours):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'tokenizer.json')
        ours.save(path)
        return tokenizers.Tokenizer.from_file(path)


if __name__ == '__main__':
    path = os.path.join(ROOT, 'data', 'shakespeare', 'input.txt')
    if len(sys.argv) > 1:
        path = sys.argv[1]
    if not os.path.isfile(path):
        sys.exit(f'error: {path}: no such file; run data/shakespeare/prepare.py first, '
                 'or name a text file')
    with open(path, encoding='utf-8', newline='') as file:
        text = file.read()
    lines = text.splitlines(keepends=True)
    megabytes = len(text.encode()) / 1e6
    print(f'{path}: {megabytes:.1f} MB, {VOCAB_SIZE:,} tokens, {os.cpu_count()} cores')

    # 1. Training, with a vocabulary of the same size.
    ours, seconds = timed(lambda: bpe.Tokenizer.train(text, VOCAB_SIZE), 3)
    print(f'train, ours                  {seconds:6.2f} s')
    learned = {bpe.to_visible(token) for token in ours.tokens.values()}
    for name, texts in (('whole text', [text]), ('by lines', lines)):
        theirs, their_seconds = timed(lambda: train_theirs(texts, len(learned)), 3)
        ratio = seconds / their_seconds
        n_common = len(learned & theirs.get_vocab().keys())
        print(f'train, theirs, {name:<13} {their_seconds:6.2f} s   ours / theirs {ratio:.2f}   '
              f'tokens in both {n_common:,} of {len(learned):,}')

    # 2. The plain trainer, on a small part: it counts all pairs again before each merge.
    part = text[:100_000]
    pattern = bpe.PATTERNS['digits']
    fast, seconds = timed(lambda: bpe.train_bpe(part, 512, pattern), 3)
    plain, plain_seconds = timed(lambda: bpe.train_bpe_plain(part, 512, pattern))
    print(f'train, ours, plain Python    {plain_seconds:6.2f} s for 256 merges of 0.1 MB   '
          f'plain / fast {plain_seconds / seconds:.0f}   same tokens: {plain == fast}')

    # 3. Encoding, with our vocabulary in both.
    theirs = open_in_theirs(ours)
    ours.encode('')  # builds the encoder
    ids, seconds = timed(lambda: ours.encode(text), 3)
    print(f'encode, ours (tiktoken)      {megabytes / seconds:6.1f} MB/s   {len(ids):,} tokens, '
          f'{len(text.encode()) / len(ids):.2f} bytes per token')
    part = text[:500_000]
    plain, seconds = timed(lambda: ours.encode_plain(part))
    print(f'encode, ours, plain Python   {len(part.encode()) / 1e6 / seconds:6.1f} MB/s')
    their_ids, seconds = timed(lambda: theirs.encode(text).ids)
    print(f'encode, theirs, whole text   {megabytes / seconds:6.1f} MB/s   '
          f'same ids: {their_ids == ids}')
    _, seconds = timed(lambda: [encoding.ids for encoding in theirs.encode_batch_fast(lines)])
    print(f'encode, theirs, by lines     {megabytes / seconds:6.1f} MB/s')

    # 4. Decoding.
    decoded, seconds = timed(lambda: ours.decode(ids), 3)
    print(f'decode, ours                 {megabytes / seconds:6.1f} MB/s   '
          f'same text: {decoded == text}')
