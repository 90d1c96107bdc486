"""
Draw what merges gain as they are learned: how long the tokens get, and how many bits per byte a
text costs. The costs are those of the simplest language model, in which each token has the
probability of its share of the training text; and, for comparison, those of trained models.

    python assets/draw_merges.py --runs=out/byte,out/bpe-512,out/bpe-2048 --out=out/merges.png
"""
import math
import os
import sys
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from bpe import PATTERNS, Tokenizer, train_bpe
from configurator import configure, load_checkpoint, read_log

# -----------------------------------------------------------------------------
input = 'data/shakespeare/input.txt'   # text: its first 90% is for training, the rest is measured
n_merges = 8192                        # merges to learn
runs = ''                              # folders of trained models, separated by commas
out = 'out/merges.png'                 # picture to write
# -----------------------------------------------------------------------------


def unigram_bits(train_ids, val_ids, vocab_size):
    """
    Bits to write val_ids, if a token has the probability of its share of train_ids. Each token is
    counted once more than it occurs, so that none has the probability 0.

    >>> unigram_bits([7, 7, 7, 7, 7, 8], [7, 8, 8], vocab_size=2)    # 6/8 and 2/8
    4.415037499278844
    """
    counts = Counter(train_ids)
    total = len(train_ids) + vocab_size
    bits = 0.0
    for token, count in Counter(val_ids).items():
        bits -= count * math.log2((counts[token] + 1) / total)
    return bits


def measure_merges(text, n_merges):
    """
    [(merges, newest token, bytes per token, bits per byte)] after 0, 1, 2, 4, 8, ... merges,
    learned on the first 90% of a text and measured on the rest.
    """
    cut = len(text) * 9 // 10
    train = text[:cut]
    val = text[cut:]
    n_bytes = len(val.encode())
    tokens = train_bpe(train, 256 + n_merges, PATTERNS['digits'])
    rows = []
    n = 0
    while n <= len(tokens) - 256:
        # The tokenizer as it was when it had learned n merges.
        tokenizer = Tokenizer(enumerate(tokens[:256 + n]), special={})
        val_ids = tokenizer.encode(val)
        bits = unigram_bits(tokenizer.encode(train), val_ids, 256 + n)
        newest = tokens[255 + n] if n else b''
        rows.append((n, newest, n_bytes / len(val_ids), bits / n_bytes))
        n = max(1, 2 * n)
    return rows


def final_figures(folder):
    """(vocabulary size, bits per byte) of a run that has ended. ValueError for another folder."""
    for record in read_log(folder):
        if 'val_bpb' in record.get('final', {}):
            size = load_checkpoint(folder)['model_args']['vocab_size']
            return size, record['final']['val_bpb']
    raise ValueError(f'{folder}: no run of train.py that has ended')


def draw(rows, trained, path):
    """Draw the rows of measure_merges and the figures of trained models."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 3.5), layout='constrained')
    sizes = [256 + n for n, _, _, _ in rows]
    left, right = figure.subplots(1, 2)

    left.plot(sizes, [length for _, _, length, _ in rows], marker='.')
    left.set_title('length of a token')
    left.set_ylabel('bytes per token')
    left.set_ylim(bottom=0)

    right.plot(sizes, [bits for _, _, _, bits in rows], marker='.',
               label='each token by its share of the text')
    if trained:
        right.plot(*zip(*sorted(trained)), marker='o', linestyle='--', label='trained transformers')
    right.set_title('cost of the text')
    right.set_ylabel('bits per byte')
    right.set_ylim(bottom=0)
    right.legend(fontsize='small')

    for axis in (left, right):
        axis.set_xscale('log', base=2)
        axis.set_xticks([2 ** k for k in range(8, 14)], [f'{2 ** k:,}' for k in range(8, 14)])
        axis.set_xlabel('tokens in the vocabulary')
        axis.grid(alpha=0.3)
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    figure.savefig(path, dpi=80)


if __name__ == '__main__':
    configure(globals())
    trained = [final_figures(folder) for folder in runs.split(',') if folder]
    with open(input, encoding='utf-8', newline='') as file:
        rows = measure_merges(file.read(), n_merges)
    print('merges  newest token    bytes per token  bits per byte')
    for n, newest, length, bits in rows:
        print(f'{n:6,}  {newest.decode(errors="replace")!r:14}  {length:15.3f}  {bits:13.3f}')
    draw(rows, trained, out)
    print(f'wrote {out}')
