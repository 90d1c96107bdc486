"""
How well trained models predict at each position of their context, up to four times their
block_size: the loss in nats per token by position, averaged over held-out text, and a picture.

    python tests/bench_positions.py [RUN_FOLDERS] [PICTURE.png]

The default is out/learned out/sinusoidal out/rope out/positions.png, the runs of
config/course/positions.py.

Learned positions end at block_size, because later positions have no embedding. A RoPE model is also
evaluated with a window of half its block_size, in which no distance exceeds those of training.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'tests')]
import torch
from torch.nn import functional as F

from bench_stream import with_config
from configurator import load_checkpoint
from data.dataset import load_dataset
from data.pretrained import load_model

STRETCH = 4                           # the longest context is this many times block_size


@torch.no_grad()
def loss_by_position(model, data, T, n_texts=512, batch_size=32):
    """The mean loss (T,) at each position, over n_texts texts evenly spread in the data."""
    starts = torch.linspace(0, len(data) - T - 1, n_texts).long()
    total = torch.zeros(T)
    for batch in starts.split(batch_size):
        texts = [torch.from_numpy(data[i:i + T + 1].astype('int64')) for i in batch.tolist()]
        ids = torch.stack(texts)                                        # (B, T + 1)
        logits, _ = model(ids[:, :-1])                                  # (B, T, V)
        losses = F.cross_entropy(logits.transpose(1, 2).float(), ids[:, 1:], reduction='none')
        total += losses.sum(dim=0)
    return total / n_texts


def curves_of_run(folder):
    """({name of a variant: its losses by position}, block_size) of a run."""
    checkpoint = load_checkpoint(folder)
    config = checkpoint['config']
    model, _ = load_model(checkpoint, {})
    T = model.config.block_size
    pos = model.config.pos
    longest = STRETCH * T
    _, data, _, _ = load_dataset(config['dataset'], longest, config['tokenizer'],
                                 config['vocab_size'])
    if pos == 'learned':
        return {pos: loss_by_position(with_config(model), data, T)}, T
    curves = {pos: loss_by_position(with_config(model, block_size=longest), data, longest)}
    if pos == 'rope':
        windowed = with_config(model, block_size=longest, window=T // 2)
        curves[f'rope, window {T // 2}'] = loss_by_position(windowed, data, longest)
    return curves, T


def print_curves(curves, T):
    """Print the mean loss of each half block_size of positions."""
    width = T // 2
    ranges = [f'{start:>4}-{start + width - 1:<4}' for start in range(0, STRETCH * T, width)]
    print(f"{'positions':>20}", *ranges)
    for name, losses in curves.items():
        means = [f'{part.mean():9.3f}' for part in losses.split(width)]
        print(f'{name:>20}', *means)


def draw_curves(curves, T, picture):
    """Draw the losses, each point a mean over 8 positions."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 3.6), layout='constrained')
    axis = figure.add_subplot(title=f'trained on {T} positions, read on {STRETCH * T}',
                              xlabel='position', ylabel='nats per token')
    for name, losses in curves.items():
        means = [part.mean() for part in losses.split(8)]
        centers = [8 * i + 4 for i in range(len(means))]
        axis.plot(centers, means, label=name)
    axis.axvline(T, color='gray', linestyle=':', label='end of the trained context')
    figure.legend(loc='outside right center', fontsize='small')
    axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=100)
    print(f'wrote {picture}')


def main():
    folders = []
    picture = 'out/positions.png'
    for word in sys.argv[1:]:
        if word.endswith('.png'):
            picture = word
        else:
            folders.append(word)
    curves = {}
    for folder in folders or ['out/learned', 'out/sinusoidal', 'out/rope']:
        run_curves, T = curves_of_run(folder)
        curves.update(run_curves)
    print_curves(curves, T)
    draw_curves(curves, T, picture)


if __name__ == '__main__':
    main()
