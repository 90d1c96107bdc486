"""
Draw which tokens a token sees, and where the KV cache keeps them: the mask of full attention, of a
sliding window, of a window with sinks, and the slots of the ring that belongs to the last one.

    python assets/draw_window.py --window=3 --n_sink=1 --out=out/window.png
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch

from configurator import configure
from model import GPTConfig, KVCache, visible

# -----------------------------------------------------------------------------
tokens = 9                # tokens to show
window = 3                # the last tokens that a token sees
n_sink = 1                # the first tokens that stay visible
out = 'out/window.png'    # picture to write
# -----------------------------------------------------------------------------

# What a cell shows, and its color.
COLORS = {'hidden': '#e2e8f0', 'window': '#93c5fd', 'sink': '#fdba74', 'itself': '#2563eb'}


def visible_positions(n_tokens, window, n_sink):
    """The positions that each query sees: a row per query with a number per key, its position, or
    -1 if it is hidden."""
    positions = torch.arange(n_tokens)
    mask = visible(positions, positions, window, n_sink)              # (T, T)
    return torch.where(mask, positions, -1).tolist()


def ring_slots(n_tokens, window, n_sink):
    """The positions that the cache holds: a row per token, after which its slots are read, with a
    number per slot, -1 = empty."""
    config = GPTConfig(n_layer=1, window=window, n_sink=n_sink)
    cache = KVCache(config, window, batch_size=1, dtype=torch.float32, device='cpu')
    rows = []
    for position in range(n_tokens):
        cache.assign_slots(torch.tensor([[position]]))
        rows.append(cache.pos[0, :cache.n_slot].tolist())
    return rows


def kind_of(position, token, n_sink):
    """The kind of a cell in the row of a token, a key of COLORS."""
    if position < 0:
        return 'hidden'
    if position == token:
        return 'itself'
    return 'sink' if position < n_sink else 'window'


def draw_cells(axis, rows, n_sink, title):
    """Draw a cell for each position in the rows, the first row on top."""
    from matplotlib.patches import Rectangle
    for token, row in enumerate(rows):
        for column, position in enumerate(row):
            kind = kind_of(position, token, n_sink)
            corner = (column - 0.5, token - 0.5)
            axis.add_patch(Rectangle(corner, 1, 1, facecolor=COLORS[kind], edgecolor='white'))
            if position >= 0:
                axis.text(column, token, str(position), ha='center', va='center', fontsize=8,
                          color='white' if kind == 'itself' else 'black')
    n_columns = len(rows[0])
    axis.set_xlim(-0.5, n_columns - 0.5)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xticks(range(n_columns))
    axis.set_yticks(range(len(rows)))
    axis.set_aspect('equal')
    axis.set_title(title, fontsize=10)


def draw(n_tokens, window, n_sink, path):
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    figure = Figure(figsize=(14, 4.4), layout='constrained')

    # 1. Three masks.
    masks = [('full attention', n_tokens, 0), (f'window {window}', window, 0),
             (f'window {window}, sinks {n_sink}', window, n_sink)]
    for number, (title, width, sinks) in enumerate(masks, start=1):
        axis = figure.add_subplot(1, 4, number)
        draw_cells(axis, visible_positions(n_tokens, width, sinks), sinks, title)
        axis.set_xlabel('key: position attended to')
        axis.set_ylabel('query: position that attends')

    # 2. The ring of the last mask: the same positions, each in its slot.
    axis = figure.add_subplot(1, 4, 4)
    title = f'KV cache of window {window}, sinks {n_sink}:\nthe position that each slot holds'
    draw_cells(axis, ring_slots(n_tokens, window, n_sink), n_sink, title)
    axis.set_xlabel('slot')
    axis.set_ylabel('after the token at position')

    names = {'itself': 'the token itself', 'window': 'in the window', 'sink': 'sink',
             'hidden': 'hidden, or an empty slot'}
    handles = [Patch(color=COLORS[kind], label=label) for kind, label in names.items()]
    figure.legend(handles=handles, loc='outside lower center', ncols=4, fontsize='small')
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    figure.savefig(path, dpi=80)


if __name__ == '__main__':
    configure(globals())
    draw(tokens, window, n_sink, out)
    print(f'wrote {out}')
