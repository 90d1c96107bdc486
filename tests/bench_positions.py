"""
How well runs predict at each distance from the start of their context, up to four times their block_size: nats a token
by position, averaged over held-out text, and a picture.

    python tests/bench_positions.py [RUNS' FOLDERS] [PICTURE.png]
    python tests/bench_positions.py out/learned out/sinusoidal out/rope assets/positions.png        the default

Learned positions end at block_size: no embedding was made for what follows. With RoPE the same weights are also read with
a window of half their block_size, in which they meet no distance that they were not trained on.
"""
import os, sys
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'tests')]
import torch
from torch.nn import functional as F
from bench_stream import with_config
from configurator import load_checkpoint
from data.dataset import load_dataset
from data.pretrained import load_model

@torch.no_grad()
def by_position(model, data, T, n_texts=512, batch=32):
    """Mean loss (T,) at each position of n_texts stretches of the data, evenly spread."""
    starts, total = torch.linspace(0, len(data) - T - 1, n_texts).long(), torch.zeros(T)
    for part in starts.split(batch):
        ids = torch.stack([torch.from_numpy(data[i:i + T + 1].astype('int64')) for i in part.tolist()])
        logits, _ = model(ids[:, :-1])
        total += F.cross_entropy(logits.transpose(1, 2).float(), ids[:, 1:], reduction='none').sum(0)
    return total / n_texts

if __name__ == '__main__':
    folders = [a for a in sys.argv[1:] if not a.endswith('.png')] or ['out/learned', 'out/sinusoidal', 'out/rope']
    picture, curves = ([a for a in sys.argv[1:] if a.endswith('.png')] or ['assets/positions.png'])[0], {}
    for folder in folders:
        checkpoint = load_checkpoint(folder)
        config, (model, tok) = checkpoint['config'], load_model(checkpoint, {})
        T, pos = model.config.block_size, model.config.pos
        _, data, _, _ = load_dataset(config['dataset'], 4 * T, config['tokenizer'], config['vocab_size'])
        variants = {pos: {}} if pos == 'learned' else {pos: dict(block_size=4 * T)}
        if pos == 'rope':
            variants[f'rope, window {T // 2}'] = dict(block_size=4 * T, window=T // 2)
        for name, changes in variants.items():
            curves[name] = by_position(with_config(model, **changes), data, changes.get('block_size', T))
    print(f"{'positions':>20}", *(f'{i:>4}-{i + T // 2 - 1:<4}' for i in range(0, 4 * T, T // 2)))
    for name, losses in curves.items():
        print(f'{name:>20}', *(f'{part.mean():9.3f}' for part in losses.split(T // 2)))
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 3.6), layout='constrained')
    axis = figure.add_subplot(title=f'trained on {T} positions, read on {4 * T}', xlabel='position', ylabel='nats a token')
    for name, losses in curves.items():
        means = losses.split(8)
        axis.plot([8 * i + 4 for i in range(len(means))], [part.mean() for part in means], label=name)
    axis.axvline(T, color='gray', linestyle=':')
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=100)
    print('drawn:', picture)
