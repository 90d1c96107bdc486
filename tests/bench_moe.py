"""
Time of a training step with 8 experts, 2 of them active, next to a dense model with the same number
of active parameters. The two take turns in one run, at the default sizes of train.py. Printed are
the time of forward and backward, and of the whole step, with each optimizer.

    python tests/bench_moe.py [ROUNDS]        default: 15
"""
import os
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import torch

import train
from model import GPT, GPTConfig

VOCAB_SIZE = 2048
WARM_UP = 2                           # rounds that are not measured


def train_step(model, optimizers, x, y):
    """The seconds that a step's forward and backward take, and those of the whole step."""
    start = time.perf_counter()
    _, loss = model(x, y)
    if model.config.n_expert:
        loss = loss + train.moe_aux_weight * model.aux_loss()
        loss = loss + train.moe_z_weight * model.aux_loss('z')
    loss.backward()
    forward_backward = time.perf_counter() - start
    torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if model.config.n_expert:
        model.balance_experts(train.moe_bias_rate)
    return forward_backward, time.perf_counter() - start


def make_models():
    """{name: model}: a dense model, and experts half as wide of which two are active."""
    flags = {}
    for name in GPTConfig.__dataclass_fields__:
        if hasattr(train, name):
            flags[name] = getattr(train, name)
    flags['vocab_size'] = VOCAB_SIZE
    dense = {**flags, 'n_hidden': 512}
    experts = {**flags, 'n_hidden': 256, 'n_expert': 8, 'n_expert_active': 2}
    return {'dense': GPT(GPTConfig(**dense)),
            '8 experts, 2 active': GPT(GPTConfig(**experts))}


def step_times(models, kind, rounds):
    """{name: tensor of two median times in seconds, see train_step} with an optimizer."""
    optimizers = {}
    times = {}
    for name, model in models.items():
        optimizers[name] = model.optimizers(
            kind, train.learning_rate, train.weight_decay, (train.beta1, train.beta2),
            train.muon_lr)
        times[name] = []
    for _ in range(WARM_UP + rounds):
        ids = torch.randint(VOCAB_SIZE, (train.batch_size, train.block_size + 1))
        for name, model in models.items():
            times[name].append(train_step(model, optimizers[name], ids[:, :-1], ids[:, 1:]))
    medians = {}
    for name, measured in times.items():
        medians[name] = torch.tensor(measured[WARM_UP:]).median(dim=0).values
    return medians


def main():
    rounds = 15
    if len(sys.argv) > 1:
        rounds = int(sys.argv[1])
    models = make_models()
    for name, model in models.items():
        print(f'{name:>20}: {model.n_params():,} parameters, '
              f'{model.n_params(active=True):,} active')
    for kind in ('adamw', 'muon'):
        medians = step_times(models, kind, rounds)
        for name, times in medians.items():
            ms = 1000 * times
            ratio = times / medians['dense']
            print(f'{kind}, {name:>20}: '
                  f'forward and backward {ms[0]:6.1f} ms ({ratio[0]:.2f} x dense), '
                  f'whole step {ms[1]:6.1f} ms ({ratio[1]:.2f} x dense)')


if __name__ == '__main__':
    main()
