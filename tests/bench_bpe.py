"""
Training and encoding, beside Hugging Face's tokenizers in the same run: python tests/bench_bpe.py [FILE]

Its trainer is fed twice: with the whole text at once, and with lines, which it cuts on all cores (ours uses one).
It orders the bytes otherwise than we do, so pairs that are equally frequent may be merged in another order.
"""
import os, sys, tempfile, time

from tokenizers import Tokenizer as Theirs, models, pre_tokenizers, trainers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from bpe import SHOWN, Tokenizer

VOCAB_SIZE = 4096


def timed(call, repeats=1):
    """The result and the least seconds of a few runs."""
    best = float('inf')
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - start)
    return result, best


def train_theirs(feed, vocab_size):
    theirs = Theirs(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    theirs.train_from_iterator(feed, trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return theirs


if __name__ == '__main__':
    path = sys.argv[1] if len(sys.argv) > 1 else os.path.join(ROOT, 'data', 'shakespeare', 'input.txt')
    if not os.path.isfile(path):
        sys.exit(f'error: {path}: no such file; run data/shakespeare/prepare.py first, or name a text file')
    with open(path, encoding='utf-8', newline='') as file:
        text = file.read()
    lines, size = text.splitlines(keepends=True), len(text.encode()) / 1e6
    print(f'{path}: {size:.1f} MB, {VOCAB_SIZE:,} tokens, {os.cpu_count()} cores')

    ours, seconds = timed(lambda: Tokenizer.train(text, VOCAB_SIZE), 3)
    print(f'train, ours                  {seconds:6.2f} s')
    learned = {''.join(SHOWN[byte] for byte in token) for token in ours.tokens.values()}
    for name, feed in (('whole text', [text]), ('by lines', lines)):
        theirs, their_seconds = timed(lambda: train_theirs(feed, len(learned)), 3)
        print(f'train, theirs, {name:<13} {their_seconds:6.2f} s   ours / theirs {seconds / their_seconds:.2f}   '
              f'tokens in both {len(learned & theirs.get_vocab().keys()):,} of {len(learned):,}')

    with tempfile.TemporaryDirectory() as folder:
        ours.save(os.path.join(folder, 'tokenizer.json'))
        theirs = Theirs.from_file(os.path.join(folder, 'tokenizer.json'))
    ours.encode('')  # builds the encoder
    ids, seconds = timed(lambda: ours.encode(text), 3)
    print(f'encode, ours (tiktoken)      {size / seconds:6.1f} MB/s   {len(ids):,} tokens, '
          f'{len(text.encode()) / len(ids):.2f} bytes a token')
    plain, seconds = timed(lambda: ours.encode_plain(text[:500_000]))
    print(f'encode, ours, plain Python   {len(text[:500_000].encode()) / 1e6 / seconds:6.1f} MB/s')
    same, seconds = timed(lambda: theirs.encode(text).ids)
    print(f'encode, theirs, whole text   {size / seconds:6.1f} MB/s   same ids: {same == ids}')
    _, seconds = timed(lambda: [encoding.ids for encoding in theirs.encode_batch_fast(lines)])
    print(f'encode, theirs, by lines     {size / seconds:6.1f} MB/s')
    text_again, seconds = timed(lambda: ours.decode(ids), 3)
    print(f'decode, ours                 {size / seconds:6.1f} MB/s   same text: {text_again == text}')
