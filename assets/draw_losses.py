"""
Draw losses next to their gradients: those of reward models, against the difference of the two
scores of a pair, or that of PPO, against the ratio of the new to the old probability.

    python assets/draw_losses.py --of=reward --out=out/reward_losses.png
    python assets/draw_losses.py --of=policy --out=out/clipped_objective.png
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from configurator import check_choice, configure
import torch

from ppo import policy_loss
from reward import pairwise_loss

# -----------------------------------------------------------------------------
of = 'reward'             # 'reward' (the losses of reward.py) | 'policy' (the loss of ppo.py)
out = 'out/losses.png'    # picture to write
# -----------------------------------------------------------------------------


def reward_curves():
    """{name: (differences of scores, losses, gradients)}, three tensors of one shape."""
    # (name, kind, margin, flip_rate) as pairwise_loss takes them
    losses = [
        ('Bradley-Terry', 'bt', None, 0.0),
        ('Bradley-Terry, flip_rate 0.1', 'bt', None, 0.1),
        ('Bradley-Terry, margin 1', 'bt_margin', torch.ones(()), 0.0),
        ('margin ranking, margin 1', 'margin', 1.0, 0.0),
    ]
    curves = {}
    for name, kind, margin, flip_rate in losses:
        d = torch.linspace(-5, 5, 401, requires_grad=True)
        values = [pairwise_loss(x, torch.zeros(()), kind, margin, flip_rate) for x in d]
        loss = torch.stack(values)
        gradient, = torch.autograd.grad(loss.sum(), d)
        curves[name] = d.detach(), loss.detach(), gradient
    return curves


def policy_curves(clip_range=0.2):
    """{name: (ratios, losses, gradients)}, three tensors of one shape."""
    curves = {}
    for advantage in (1.0, -1.0):
        ratio = torch.linspace(0.5, 1.5, 401, requires_grad=True)
        values = []
        for x in ratio:
            loss = policy_loss(x.log(), torch.zeros(()), torch.tensor(advantage), torch.ones(()),
                               clip_range)
            values.append(loss)
        loss = torch.stack(values)
        gradient, = torch.autograd.grad(loss.sum(), ratio)
        curves[f'advantage {advantage:+.0f}'] = ratio.detach(), loss.detach(), gradient
    return curves


def draw_losses(curves, xlabel, unit, path):
    """Draw the losses, whose unit is named, on the left and their gradients on the right."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 3.8), layout='constrained')
    labels = [('loss', unit), ('gradient of the loss', 'derivative of the loss')]
    for number, (title, ylabel) in enumerate(labels, start=1):
        axis = figure.add_subplot(1, 2, number, title=title, xlabel=xlabel, ylabel=ylabel)
        for name, curve in curves.items():
            axis.plot(curve[0], curve[number], label=name)
        axis.grid(alpha=0.3)
        axis.axhline(0, color='black', linewidth=0.6)
    figure.axes[0].legend(fontsize='small')
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    figure.savefig(path, dpi=80)


if __name__ == '__main__':
    config, _ = configure(globals())
    check_choice(config, 'of', ('reward', 'policy'))
    if of == 'reward':
        draw_losses(reward_curves(), 'd: chosen score - rejected score', 'loss of a pair', out)
    else:
        draw_losses(policy_curves(), 'ratio: new / old probability', 'loss of a token', out)
    print(f'wrote {out}')
