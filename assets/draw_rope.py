"""
Draw RoPE (arXiv 2104.09864) as what it is, a rotation: one pair of channels at several positions; a
query and a key that keep their angle when both move; and how fast each pair of a head turns.

    python assets/draw_rope.py --out=out/rope.png
"""
import math
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch

from configurator import configure
from model import GPTConfig, rope_frequencies, rope_table, rotate

# -----------------------------------------------------------------------------
angle = 25              # degrees per position of the pair in the first two panels
n_embd = 64             # the last panel: a model with this width
n_head = 4              # and this number of heads
positions = 64          # positions in the last panel
out = 'out/rope.png'    # picture to write
# -----------------------------------------------------------------------------

QUERY = (0.2, 1.0)      # a pair of channels of a query, before the rotation
KEY = (0.7, 0.1)        # the same pair of a key


def at_position(pair, position, degrees):
    """The pair (x, y) after the rotation by `degrees` per position, as the model rotates it."""
    frequencies = torch.tensor([math.radians(degrees)])
    rope = rope_table(torch.tensor([[position]]), frequencies)
    x = torch.tensor(pair).view(1, 1, 1, 2)
    return rotate(x, rope).flatten().tolist()


def pair_angles(config, n_positions):
    """The angle in turns (hs/2, n_positions) of every pair of channels at every position."""
    turns = rope_frequencies(config) / (2 * math.pi)
    return turns[:, None] * torch.arange(n_positions)


def add_arrow(axis, tip, label, color):
    """Draw an arrow from the origin, with a label beyond its tip."""
    style = dict(arrowstyle='-|>', color=color, lw=1.8)
    axis.annotate('', xy=tip, xytext=(0, 0), arrowprops=style)
    x, y = tip
    length = math.hypot(x, y)
    # A label is wider than high, so it is moved further to the side than up or down.
    x += (0.07 + 0.03 * len(label)) * x / length
    y += 0.13 * y / length
    axis.text(x, y, label, color=color, fontsize=8, ha='center', va='center')


def prepare_plane(axis, title):
    """A square panel for arrows, with the unit circle."""
    from matplotlib.patches import Circle
    axis.add_patch(Circle((0, 0), 1, fill=False, color='gray', linestyle=':'))
    axis.set_xlim(-1.35, 1.35)
    axis.set_ylim(-1.35, 1.35)
    axis.set_aspect('equal')
    axis.set_title(title, fontsize=10)
    axis.set_xlabel('channel i')
    axis.set_ylabel('channel i + hs/2')
    axis.grid(alpha=0.3)


def draw_rotation(axis, degrees):
    """The pair (1, 0) at six positions."""
    prepare_plane(axis, f'the pair (1, 0) at positions 0 to 5:\n{degrees} degrees per position')
    for position in range(6):
        tip = at_position((1.0, 0.0), position, degrees)
        add_arrow(axis, tip, str(position), f'C{position}')


def draw_distance(axis, degrees):
    """A query two positions after a key, at two places of the text."""
    title = 'a query 2 positions after a key, at two places:\nthe same angle, so the same product'
    prepare_plane(axis, title)
    for query_position, color in ((2, 'C0'), (5, 'C1')):
        key_position = query_position - 2
        q = at_position(QUERY, query_position, degrees)
        k = at_position(KEY, key_position, degrees)
        product = q[0] * k[0] + q[1] * k[1]
        add_arrow(axis, q, f'q at {query_position}', color)
        add_arrow(axis, k, f'k at {key_position}', color)
        axis.plot([], [], color=color,
                  label=f'positions {query_position} and {key_position}: {product:.3f}')
    axis.legend(fontsize=8, loc='lower right', title='product q · k', title_fontsize=8)


def draw_speeds(figure, axis, config, n_positions):
    """The cosine of the angle of every pair (rows) at every position (columns)."""
    cosines = (2 * math.pi * pair_angles(config, n_positions)).cos()
    picture = axis.imshow(cosines.numpy(), aspect='auto', cmap='RdBu', vmin=-1, vmax=1)
    axis.set_title(f'the {len(cosines)} pairs of a head of size {config.head_size}:\n'
                   'the first turns fast, the last hardly at all', fontsize=10)
    axis.set_xlabel('position')
    axis.set_ylabel('pair')
    axis.set_yticks(range(len(cosines)))
    figure.colorbar(picture, ax=axis, label='cosine of the angle')


def draw(config, degrees, n_positions, path):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(14, 4.3), layout='constrained')
    draw_rotation(figure.add_subplot(1, 3, 1), degrees)
    draw_distance(figure.add_subplot(1, 3, 2), degrees)
    draw_speeds(figure, figure.add_subplot(1, 3, 3), config, n_positions)
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    figure.savefig(path, dpi=80)


if __name__ == '__main__':
    configure(globals())
    config = GPTConfig(n_embd=n_embd, n_head=n_head)
    draw(config, angle, positions, out)
    print(f'wrote {out}')
