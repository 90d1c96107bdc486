"""
Compare runs: print the settings in which they differ next to their results, and draw their curves.

    python assets/draw.py out/a out/b
    python assets/draw.py out/a out/b --out=compare.png --metrics=loss,val_loss --first=100

Runs that differ only in their seed are drawn as one curve, their mean, in a band from the lowest
to the highest value. The stage scripts call `draw_curves` at their end for the curves of one run.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from configurator import configure, load_checkpoint, printable, read_log

# -----------------------------------------------------------------------------
out = 'compare.png'      # picture to write
metrics = ''             # metrics to draw, separated by commas, such as loss,val_loss; '' = all
first = 0                # first step to draw
# -----------------------------------------------------------------------------

# What the vertical axis of a metric measures, where its name does not say it.
UNITS = {
    'loss': 'nats',
    'val_loss': 'nats per token',
    'val_bpb': 'bits per byte',
    'response_loss': 'nats per token',
    'lr': 'learning rate',
    'grad_norm': 'L2 norm',
    'ms': 'milliseconds per step',
    'tokens_per_second': 'tokens per second',
    'episodes_per_second': 'episodes per second',
    'response_length': 'tokens',
    'val/explained_variance': 'share of the variance',
    'objective/gold': 'share of correct responses',
    'objective/kl': 'nats per response',
    'objective/kl_exact': 'nats per response',
    'objective/kl_k3': 'nats per response',
    'objective/entropy': 'nats per token',
    'objective/score': 'reward',
    'objective/rlhf_reward': 'reward',
    'moe_entropy': 'nats per token',
}

# Settings that differ between any two runs and explain nothing.
NAMES_OF_A_RUN = ('out_dir', 'wandb_run_name')

# -----------------------------------------------------------------------------
# Collect the curves


def split_expert_key(key):
    """
    Split the logged share of an expert into its layer and its expert. Every other metric has no
    layer.

    >>> split_expert_key('moe/layer_3/expert_0')
    ('moe/layer_3', 'expert_0')
    >>> split_expert_key('loss')
    ('', 'loss')
    """
    if not key.startswith('moe/'):
        return '', key
    layer, _, expert = key.rpartition('/')
    return layer, expert


def read_points(folder, first):
    """Every logged number of a run as (step, metric, value), from the step `first` on."""
    points = []
    for record in read_log(folder):
        if record.get('step', -1) < first:
            continue
        for key, value in record.items():
            # A number that was not finite is logged as null.
            if key != 'step' and value is not None:
                points.append((record['step'], key, value))
    return points


def collect_curves(folders, labels, metrics='', first=0):
    """
    Read the curves of the runs in `folders` from their logs.

    Args:
        labels: one per run; runs with the same label form one curve.
        metrics: names of metrics separated by commas; '' = all. The name of a layer, such as
            moe/layer_3, selects the shares of all its experts.
        first: first step to include.

    Returns:
        {panel: {curve: {step: [value of each run]}}}. A metric has one panel, with a curve per
        label. A layer's experts share one panel per label, with a curve per expert, unless
        `metrics` names the expert.
    """
    wanted = metrics.split(',') if metrics else []
    panels = {}
    for folder, label in zip(folders, labels):
        for step, key, value in read_points(folder, first):
            layer, expert = split_expert_key(key)
            if wanted and key not in wanted and layer not in wanted:
                continue
            # 1. Choose the panel and the curve of this number.
            if not layer or key in wanted:
                panel = key
                curve = label
            else:
                panel = f'{layer} ({label})' if len(folders) > 1 else layer
                curve = expert
            # 2. Append it to the values at its step.
            curves = panels.setdefault(panel, {})
            points = curves.setdefault(curve, {})
            points.setdefault(step, []).append(value)
    return panels


# -----------------------------------------------------------------------------
# Draw them


def draw_panel(axis, panel, curves, colors):
    """
    Draw the curves of one panel: the mean over the runs of a curve, in a band from the lowest to
    the highest value.

    Args:
        curves: {curve: {step: [value of each run]}}.
        colors: {curve: color}, the same in every panel.
    """
    for curve, points in curves.items():
        steps = sorted(points)
        means = []
        lowest = []
        highest = []
        for step in steps:
            values = points[step]
            means.append(sum(values) / len(values))
            lowest.append(min(values))
            highest.append(max(values))
        axis.plot(steps, means, label=curve, color=colors[curve])
        axis.fill_between(steps, lowest, highest, alpha=0.2, color=colors[curve])
    axis.set_title(panel)
    axis.set_xlabel('step')
    if panel.startswith('moe/'):
        axis.set_ylabel('share of tokens')
    else:
        axis.set_ylabel(UNITS.get(panel, ''))
    axis.grid(alpha=0.3)


def add_legends(figure, panels, columns):
    """Add a legend to each panel of experts, and one below the figure that names the runs."""
    most = None
    for axis, curves in zip(figure.axes, panels.values()):
        if len(curves) < 2:
            continue
        if axis.get_title().startswith('moe/'):
            legend_columns = 2 if len(curves) > 6 else 1
            axis.legend(fontsize='small', ncols=legend_columns)
        elif most is None or len(axis.lines) > len(most.lines):
            most = axis
    # All other panels show the same runs in the same colors, so one legend is enough.
    if most is not None:
        figure.legend(handles=list(most.lines), loc='outside lower center', ncols=columns,
                      fontsize='small')


def draw_curves(folders, path, labels=None, metrics='', first=0):
    """
    Draw the logged metrics of the runs in `folders` against the step, one panel per metric.

    `labels`, one per run, default to the folders; for the other arguments see `collect_curves`.
    If matplotlib is missing or nothing was logged, one line is printed and nothing is drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(printable(f'{path} not drawn: it needs pip install matplotlib'))
        return
    panels = collect_curves(folders, labels or folders, metrics, first)
    if not panels:
        print(printable(
            f'{path} not drawn: no {metrics or "metric"} is logged from step {first} on'))
        return

    # 1. Losses come first, then the other metrics by name.
    ordered = sorted(panels.items(), key=lambda panel: ('loss' not in panel[0], panel[0]))
    panels = dict(ordered)

    # 2. A curve has the same color in every panel.
    colors = {}
    for curves in panels.values():
        for curve in curves:
            colors.setdefault(curve, f'C{len(colors) % 10}')

    # 3. Draw the panels, at most three per row.
    columns = min(3, len(panels))
    rows = (len(panels) + columns - 1) // columns
    figure = Figure(figsize=(5 * columns, 3.5 * rows), layout='constrained')
    for number, (name, curves) in enumerate(panels.items(), start=1):
        axis = figure.add_subplot(rows, columns, number)
        draw_panel(axis, name, curves, colors)
    add_legends(figure, panels, columns)
    figure.savefig(path, dpi=80)


# -----------------------------------------------------------------------------
# Compare runs


def load_run(folder):
    """
    Load what a comparison needs of a run.

    Returns:
        (settings, figures): its settings, with the stage among them, and its final figures, empty
        if it has not ended. ValueError if the folder holds no run.
    """
    if not os.path.exists(os.path.join(folder, 'ckpt.pt')):
        raise ValueError(f'{folder}: no run there (no ckpt.pt)')
    checkpoint = load_checkpoint(folder)
    settings = {'stage': checkpoint.get('stage'), **checkpoint['config']}
    figures = {}
    for record in read_log(folder):
        figures = record.get('final', figures)
    return settings, figures


def differing_settings(configs):
    """
    The names of the settings that all runs have and in which they differ, in their order.

    >>> differing_settings([{'seed': 1, 'lr': 0.1, 'gamma': 1}, {'seed': 2, 'lr': 0.1}])
    ['seed']
    """
    shared = set(configs[0])
    for config in configs:
        shared &= set(config)
    names = []
    for name, value in configs[0].items():
        if name not in shared or name in NAMES_OF_A_RUN:
            continue
        if any(config[name] != value for config in configs):
            names.append(name)
    return names


def format_figure(value):
    """A final figure as text; '-' where there is none."""
    if value is None:
        return '-'
    if isinstance(value, (int, float)):
        return f'{value:.4g}'
    return str(value)


def print_table(rows):
    """Print rows of texts, the columns aligned on the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        line = ''
        for cell, width in zip(row, widths):
            line += cell.ljust(width + 2)
        # The settings come from a file that somebody else may have written.
        print(printable(line.rstrip()))


def curve_labels(folders, configs, names):
    """
    One label per run: its settings among `names`, except for the seed. Runs that differ only in
    their seed therefore have the same label. A run without such settings is labelled by its folder,
    and so is every run if they are of different stages, which differ in too many settings.
    """
    if 'stage' in names:
        return folders
    labels = []
    for folder, config in zip(folders, configs):
        parts = [f'{name} {config[name]}' for name in names if name != 'seed']
        labels.append(', '.join(parts) or folder)
    return labels


def compare(folders, picture, metrics='', first=0):
    """
    Print the settings in which runs differ next to their final figures, and draw their curves.

    Runs of different stages are compared in the settings that they share. For `metrics` and
    `first` see `collect_curves`. ValueError if there are no folders or one of them holds no run.
    """
    if not folders:
        raise ValueError('name the folders of the runs: python assets/draw.py out/a out/b')
    configs = []
    finals = []
    for folder in folders:
        settings, figures = load_run(folder)
        configs.append(settings)
        finals.append(figures)

    # 1. One row per setting that differs, then one per final figure of any run.
    rows = [['', *folders]]
    names = differing_settings(configs)
    for name in names:
        rows.append([name, *(str(config[name]) for config in configs)])
    rows.append(['---'] * (1 + len(folders)))
    figure_names = {}
    for figures in finals:
        figure_names.update(figures)
    for name in figure_names:
        rows.append([name, *(format_figure(figures.get(name)) for figures in finals)])
    print_table(rows)

    # 2. The curves.
    draw_curves(folders, picture, curve_labels(folders, configs, names), metrics, first)


if __name__ == '__main__':
    # `configure` would take the folders for config files, so they are removed first.
    folders = [word.rstrip('/') for word in sys.argv[1:] if not word.startswith('-')]
    sys.argv[1:] = [word for word in sys.argv[1:] if word.startswith('-')]
    configure(globals())
    compare(folders, out, metrics, first)
