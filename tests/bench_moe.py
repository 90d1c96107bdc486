"""
A training step of 8 experts, 2 active, beside that of a dense model with the same active parameters, taking turns in
one run, at the default sizes of train.py: forward and backward, and all of it with each optimizer.

    python tests/bench_moe.py [ROUNDS]        default: 15
"""
import os, sys, time
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import torch
import train
from model import GPT, GPTConfig

def step(model, optimizers, x, y):
    """Seconds of a step's forward and backward, and of the whole step."""
    began = time.perf_counter()
    loss = model(x, y)[1]
    if model.config.n_expert:
        loss = loss + train.moe_aux_weight * model.aux_loss() + train.moe_z_weight * model.aux_loss('z')
    loss.backward()
    half = time.perf_counter() - began
    torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
    for o in optimizers:
        o.step()
        o.zero_grad(set_to_none=True)
    if model.config.n_expert:
        model.balance(train.moe_bias_rate)
    return half, time.perf_counter() - began

if __name__ == '__main__':
    rounds, vocab_size = int(sys.argv[1]) if len(sys.argv) > 1 else 15, 2048
    flags = {k: getattr(train, k) for k in GPTConfig.__dataclass_fields__ if hasattr(train, k)} | {'vocab_size': vocab_size}
    models = {'dense': GPT(GPTConfig(**flags | {'n_hidden': 512})),
              '8 experts, 2 active': GPT(GPTConfig(**flags | {'n_hidden': 256, 'n_expert': 8, 'n_expert_active': 2}))}
    for name, model in models.items():
        print(f'{name:>20}: {model.n_params():,} parameters, {model.n_params(active=True):,} active')
    for kind in ('adamw', 'muon'):
        optimizers = {name: model.optimizers(kind, train.learning_rate, train.weight_decay, (train.beta1, train.beta2),
                                             train.muon_lr) for name, model in models.items()}
        times = {name: [] for name in models}
        for i in range(rounds + 2):                                   # two to warm up
            ids = torch.randint(vocab_size, (train.batch_size, train.block_size + 1))
            for name, model in models.items():
                times[name].append(step(model, optimizers[name], ids[:, :-1], ids[:, 1:]))
        medians = {name: torch.tensor(t[2:]).median(0).values for name, t in times.items()}
        for name, (half, whole) in medians.items():
            ratio = medians[name] / medians['dense']
            print(f'{kind}, {name:>20}: forward and backward {1000 * half:6.1f} ms ({ratio[0]:.2f} x dense), '
                  f'whole step {1000 * whole:6.1f} ms ({ratio[1]:.2f} x dense)')
