"""
Draw the pipeline of the project as one picture: the four stages, the data that each one reads,
and which stage starts from which.

    python assets/draw_pipeline.py --out=out/pipeline.png
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from configurator import configure

# -----------------------------------------------------------------------------
out = 'out/pipeline.png'         # picture to write
# -----------------------------------------------------------------------------

# All lengths are in inches. A README shows the picture 9 inches wide at 100 pixels per inch.
WIDTH = 9.0
HEIGHT = 3.05
COLUMN = WIDTH / 4               # one column per stage
BOX_WIDTH = 1.86
BOX_BOTTOM = 0.72
BOX_TOP = 1.92
DATA_WIDTH = 1.66
DATA_BOTTOM = 2.38
DATA_TOP = 2.90
DETOUR = 0.34                    # height of the arrow that passes below the reward model

INK = '#1f2933'
MUTED = '#52606d'
ARROW = '#64748b'

# (name, script, what goes in, what comes out, frame color, background color)
STAGES = [
    ('Base model', 'train.py', 'text', 'next-token predictor', '#2563eb', '#eff4ff'),
    ('SFT', 'sft.py', 'base + demonstrations', 'chat model', '#0f8a5f', '#ecfaf3'),
    ('Reward model', 'reward.py', 'SFT + preference pairs', 'score of a response', '#b45309',
     '#fff6e9'),
    ('PPO', 'ppo.py', 'SFT + reward + prompts', 'aligned chat model', '#7c3aed', '#f5f0ff'),
]

# (name, what one record of it holds), in the order of the stages that read them
DATA = [
    ('Text', 'files or web pages'),
    ('Demonstrations', 'prompt, response'),
    ('Preference pairs', 'prompt, chosen, rejected'),
    ('Prompts', 'prompt only'),
]


def center(column):
    """The x coordinate of the center of a column, counted from 0."""
    return COLUMN * (column + 0.5)


def add_box(axis, x, bottom, top, width, edge, face):
    """Draw a rounded box that is centered at x."""
    from matplotlib.patches import FancyBboxPatch
    box = FancyBboxPatch((x - width / 2, bottom), width, top - bottom,
                         boxstyle='round,pad=0,rounding_size=0.09',
                         edgecolor=edge, facecolor=face, linewidth=1.4)
    axis.add_patch(box)


def add_stage(axis, x, stage):
    """Draw the box of a stage: its name, its script, its inputs and its result."""
    name, script, inputs, result, edge, face = stage
    add_box(axis, x, BOX_BOTTOM, BOX_TOP, BOX_WIDTH, edge, face)
    axis.text(x, BOX_TOP - 0.24, name, fontsize=11.5, fontweight='bold', color=edge,
              ha='center', va='center')
    axis.text(x, BOX_TOP - 0.50, script, fontsize=9, family='monospace', color=INK,
              ha='center', va='center')
    # The lines "in" and "out" are aligned on the left.
    left = x - BOX_WIDTH / 2 + 0.12
    axis.text(left, BOX_TOP - 0.80, 'in', fontsize=7.8, color=MUTED, va='center')
    axis.text(left, BOX_TOP - 1.02, 'out', fontsize=7.8, color=MUTED, va='center')
    axis.text(left + 0.28, BOX_TOP - 0.80, inputs, fontsize=7.8, color=INK, va='center')
    axis.text(left + 0.28, BOX_TOP - 1.02, result, fontsize=7.8, color=INK, va='center')


def add_data(axis, x, data):
    """Draw the box of a kind of data, with the fields of one record."""
    name, fields = data
    add_box(axis, x, DATA_BOTTOM, DATA_TOP, DATA_WIDTH, '#cbd2d9', '#f8fafc')
    axis.text(x, DATA_TOP - 0.17, name, fontsize=9, fontweight='bold', color=INK,
              ha='center', va='center')
    axis.text(x, DATA_TOP - 0.37, fields, fontsize=7.8, color=MUTED, ha='center', va='center')


def add_arrow(axis, points):
    """Draw a line through the points (x, y), with an arrow head at the last one."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path
    arrow = FancyArrowPatch(path=Path(points), arrowstyle='-|>', mutation_scale=11,
                            color=ARROW, linewidth=1.5, capstyle='butt', joinstyle='round')
    axis.add_patch(arrow)


def draw_pipeline(path):
    """Write the picture of the pipeline to `path`."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(WIDTH, HEIGHT), facecolor='white')
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(0, WIDTH)
    axis.set_ylim(0, HEIGHT)
    axis.set_axis_off()

    # 1. The stages, and above each one the data that it reads.
    for column, (stage, data) in enumerate(zip(STAGES, DATA)):
        x = center(column)
        add_stage(axis, x, stage)
        add_data(axis, x, data)
        add_arrow(axis, [(x, DATA_BOTTOM), (x, BOX_TOP)])

    # 2. Each stage starts from the one before it; PPO also uses the reward model's scores.
    middle = (BOX_BOTTOM + BOX_TOP) / 2
    for column in range(3):
        right = center(column) + BOX_WIDTH / 2
        next_left = center(column + 1) - BOX_WIDTH / 2
        add_arrow(axis, [(right, middle), (next_left, middle)])

    # 3. PPO starts from the SFT model, so this arrow passes below the reward model.
    start = center(1)
    end = center(3)
    add_arrow(axis, [(start, BOX_BOTTOM), (start, DETOUR), (end, DETOUR), (end, BOX_BOTTOM)])
    axis.text(center(2), DETOUR - 0.15, 'initial policy and reference for the KL penalty',
              fontsize=7.8, color=MUTED, ha='center', va='center')
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    figure.savefig(path, dpi=200)


if __name__ == '__main__':
    configure(globals())
    draw_pipeline(out)
    print(f'wrote {out}')
