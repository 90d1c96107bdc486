"""
The pictures of runs: one run's curves, and several beside each other. Called by the Logger at a run's end, and by
`python configurator.py out/a out/b`.
"""
import numpy as np
from configurator import load_checkpoint, read_log

def draw(folders, path, labels=None, metrics='', first=0):
    """Draw every logged metric of the runs (or those named in `metrics`, with commas between, from the step `first` on)
    against the step, a panel each. Runs of one label are one curve, their mean, in a band from the lowest to the highest.
    The shares of a layer's experts have a panel together, one for each label, unless they are named in full. Without
    matplotlib it is said that nothing was drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print(f'{path} not drawn: it needs pip install matplotlib')
    wanted, series = metrics.split(','), {}  # panel -> curve -> step -> values of the runs of that curve
    for folder, label in zip(folders, labels or folders):
        for record in (r for r in read_log(folder) if r.get('step', -1) >= first):
            for key in (k for k, v in record.items() if k != 'step' and v is not None):
                group, _, part = key.rpartition('/') if key.startswith('moe/') else ('', '', key)
                if metrics and not {key, group} & set(wanted):
                    continue
                panel, curve = (key, label) if key in wanted or not group else (
                    f'{group} ({label})' if len(folders) > 1 else group, part)
                series.setdefault(panel, {}).setdefault(curve, {}).setdefault(record['step'], []).append(record[key])
    if not series:
        return print(f'{path} not drawn: no {metrics or "metric"} is logged from step {first} on')
    curves = [*dict.fromkeys(curve for panel in series.values() for curve in panel)]
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    figure = Figure(figsize=(5 * columns, 3.5 * rows), layout='constrained')
    for i, key in enumerate(sorted(series, key=lambda k: ('loss' not in k, k)), 1):
        axis = figure.add_subplot(rows, columns, i, title=key, xlabel='step')
        for label, points in series[key].items():
            steps, values = zip(*sorted(points.items()))
            color = f'C{curves.index(label) % 10}'  # the same in every panel
            axis.plot(steps, [np.mean(v) for v in values], label=label, color=color)
            axis.fill_between(steps, [*map(min, values)], [*map(max, values)], alpha=0.2, color=color)
        axis.grid(alpha=0.3)
        if len(series[key]) > 1 and key.startswith('moe/'):
            axis.legend(fontsize='small', ncols=1 + (len(series[key]) > 6))
    most = max(figure.axes, key=lambda axis: len(axis.lines) * (axis.get_legend() is None))
    if len(most.lines) > 1 and not most.get_legend():  # the runs have one legend for all panels
        figure.legend(handles=[*most.lines], loc='outside lower center', ncols=columns, fontsize='small')
    figure.savefig(path, dpi=80)

def compare(folders, picture, metrics='', first=0):
    """Print the settings in which finished runs differ beside their results, and draw their curves."""
    if not folders:
        raise ValueError('name the folders of the runs to compare: python configurator.py out/a out/b')
    configs = [load_checkpoint(folder)['config'] for folder in folders]
    finals = [next((r['final'] for r in read_log(folder) if 'final' in r), {}) for folder in folders]
    differ = [k for k in dict.fromkeys(k for c in configs for k in c) if k not in ('out_dir', 'wandb_run_name')
              and any(c.get(k) != configs[0].get(k) for c in configs)]
    rows = [['', *folders], *([k, *(str(c.get(k)) for c in configs)] for k in differ), ['---'] * (1 + len(folders))]
    for k in dict.fromkeys(k for f in finals for k in f):
        rows.append([k, *('-' if f.get(k) is None else f'{f[k]:.4g}' for f in finals)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print(*(cell.ljust(width) for cell, width in zip(row, widths)), sep='  ')
    labels = [', '.join(f'{k} {c.get(k)}' for k in differ if k != 'seed') for c in configs]
    draw(folders, picture, [label or folder for label, folder in zip(labels, folders)], metrics, first)
