"""
Draw the learning rates and the validation losses of runs with different schedules. A schedule has
one color; dashed lines are runs without warm-up.

    python assets/draw_schedules.py out/cosine-0 out/cosine-20 out/wsd-0 out/wsd-20 \
        --out=out/schedules.png
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from assets.draw import collect_curves, load_run
from configurator import configure, learning_rate_at

# -----------------------------------------------------------------------------
out = 'out/schedules.png'     # picture to write
first = 50                    # first step of the losses to draw; the rates begin at step 0
# -----------------------------------------------------------------------------


def rates_of(settings):
    """The learning rate at each step of a run, from its settings."""
    rates = []
    for step in range(settings['max_iters'] + 1):
        rates.append(learning_rate_at(step, settings))
    return rates


def draw_schedules(folders, path, first=0):
    """Draw the runs in `folders`: their rates on the left, their losses on the right. ValueError if
    there are none."""
    if not folders:
        raise ValueError('name the folders of the runs, such as out/cosine-0 out/cosine-20')
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 3.8), layout='constrained')
    left, right = figure.subplots(1, 2)
    colors = {}
    for folder in folders:
        settings, _ = load_run(folder)
        schedule = settings['lr_schedule']
        warmup = settings['warmup_iters']
        # 1. The style of the run in both panels.
        color = colors.setdefault(schedule, f'C{len(colors)}')
        style = '-'
        if warmup == 0:
            style = '--'
        label = f'{schedule}, {warmup} steps of warm-up'
        # 2. Its curves. Curves that coincide are visible, because later ones are thinner.
        width = 3.2 - 0.7 * (len(colors) - 1)
        rates = rates_of(settings)
        left.plot(range(len(rates)), rates, style, color=color, linewidth=width, label=label)
        panels = collect_curves([folder], [label], 'val_loss', first)
        losses = panels.get('val_loss', {label: {}})[label]
        right.plot(list(losses), list(losses.values()), style, color=color, label=label)
    left.set_title('learning rate of AdamW')
    left.set_ylabel('learning rate')
    right.set_title(f'validation loss from step {first} on')
    right.set_ylabel('nats per token')
    for axis in (left, right):
        axis.set_xlabel('step')
        axis.grid(alpha=0.3)
    figure.legend(handles=list(left.lines), loc='outside lower center', ncols=len(colors),
                  fontsize='small')
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    figure.savefig(path, dpi=80)


if __name__ == '__main__':
    # `configure` would take the folders for config files, so they are removed first.
    folders = []
    for word in sys.argv[1:]:
        if not word.startswith('-'):
            folders.append(word.rstrip('/'))
    sys.argv[1:] = [word for word in sys.argv[1:] if word.startswith('-')]
    configure(globals())
    draw_schedules(folders, out, first)
    print(f'wrote {out}')
