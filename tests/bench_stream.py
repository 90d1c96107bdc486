"""
A trained model reads a text a hundred times as long as its block_size, with four kinds of cache:
perplexity and memory of each, and a picture.

    python tests/bench_stream.py [RUN_FOLDER] [PICTURE]     defaults: out/base out/streaming.png

- windows, recomputed: no cache; each token is predicted from the block_size tokens before it, which
  are read anew. This is the quality to reach.
- sinks (4): the first four tokens stay visible and move along with a window that fills the rest of
  block_size (arXiv 2309.17453).
- no sinks: the window alone.
- nothing dropped: all keys are kept, so distances exceed those of training and the cache grows.
"""
import dataclasses
import math
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import torch
from torch.nn import functional as F

from configurator import load_checkpoint
from data.dataset import load_dataset
from data.pretrained import load_model
from model import GPT

N_BLOCKS = 100                        # length of the text, in blocks of block_size tokens


def with_config(model, **changes):
    """A model with the same weights and other flags, in evaluation mode."""
    other = GPT(dataclasses.replace(model.config, **changes)).eval()
    other.load_state_dict(model.state_dict())
    return other


@torch.no_grad()
def streamed(model, ids, chunk=64):
    """
    Read ids (n,) through a cache, `chunk` tokens at a time.

    Returns:
        (losses, held): the loss of each token after the first, in nats (n - 1,), and the bytes that
        the cache held after each chunk.
    """
    cache = model.new_cache(1)
    losses = []
    held = []
    for i in range(0, len(ids) - 1, chunk):
        y = ids[i + 1:i + 1 + chunk]
        x = ids[i:i + len(y)]
        logits, _ = model(x[None], cache=cache)                         # (1, chunk, V)
        losses.append(F.cross_entropy(logits[0].float(), y, reduction='none'))
        held.append(cache.k.nbytes + cache.v.nbytes + cache.pos.nbytes)
    return torch.cat(losses), held


@torch.no_grad()
def recomputed(model, ids):
    """The loss of each token after the first block, from the block_size tokens before it."""
    T = model.config.block_size
    windows = ids.unfold(0, T + 1, 1)                                   # (n - T, T + 1)
    losses = []
    for batch in windows.split(128):
        hidden = model.hidden(batch[:, :-1])                            # (B, T, C)
        logits = model.lm_head(hidden[:, -1]).float()                   # (B, V)
        losses.append(F.cross_entropy(logits, batch[:, -1], reduction='none'))
    return torch.cat(losses)


def draw(curves, T, picture):
    """Draw perplexity against the tokens read, each point over five blocks."""
    from matplotlib.figure import Figure
    width = 5 * T
    figure = Figure(figsize=(8, 4.5), layout='constrained')
    axis = figure.add_subplot(title=f'Reading past block_size {T}', xlabel='tokens read',
                              ylabel='perplexity', yscale='log')
    for number, (name, losses) in enumerate(curves.items()):
        n_points = len(losses) // width
        perplexity = losses[:n_points * width].view(n_points, width).mean(dim=1).exp()
        centers = [width * (i + 0.5) for i in range(n_points)]
        # Each curve is thinner than the one below it, so that curves that coincide are all visible.
        axis.plot(centers, perplexity.numpy(), label=name, linewidth=5 - 1.2 * number)
    # 20 instead of 2 x 10^1
    axis.yaxis.set_major_formatter('{x:g}')
    axis.yaxis.set_minor_formatter('{x:g}')
    axis.legend()
    axis.grid(alpha=0.3)
    os.makedirs(os.path.dirname(picture) or '.', exist_ok=True)
    figure.savefig(picture, dpi=80)
    print(f'wrote {picture}')


def main():
    folder = 'out/base'
    picture = 'out/streaming.png'
    if len(sys.argv) > 1:
        folder = sys.argv[1]
    if len(sys.argv) > 2:
        picture = sys.argv[2]

    # 1. The model and the held-out text.
    checkpoint = load_checkpoint(folder)
    config = checkpoint['config']
    model, _ = load_model(checkpoint, {})
    model.eval()
    T = model.config.block_size
    _, val_data, _, _ = load_dataset(config['dataset'], T, config['tokenizer'],
                                     config['vocab_size'])
    ids = torch.from_numpy(val_data[:N_BLOCKS * T + 1].astype('int64'))
    print(f'{folder}: block_size {T}, {len(ids) - 1:,} tokens of held-out text')

    # 2. The quality to reach.
    name = 'windows, recomputed'
    curves = {name: recomputed(model, ids)}
    target = math.exp(curves[name].mean())
    print(f'{name:>20}: perplexity {target:8.3f}')

    # 3. The three caches, measured on the same tokens: those after the first block.
    variants = {'sinks (4)': with_config(model, n_sink=4), 'no sinks': model,
                'nothing dropped': with_config(model, block_size=N_BLOCKS * T)}
    for name, variant in variants.items():
        losses, held = streamed(variant, ids)
        curves[name] = losses[T - 1:]
        perplexity = math.exp(curves[name].mean())
        print(f'{name:>20}: perplexity {perplexity:8.3f}, '
              f'{100 * (perplexity / target - 1):+6.1f}%; cache of {held[0]:,} bytes '
              f'at the start, {held[-1]:,} at the end')
    draw(curves, T, picture)


if __name__ == '__main__':
    main()
