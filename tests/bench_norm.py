"""
LayerNorm next to RMSNorm: the norm of the loss's gradient in each layer, for new and for trained
models, and the time of a training step. The two models take turns in one run.

    python tests/bench_norm.py [LAYERNORM_RUN] [RMSNORM_RUN]

The defaults are out/layernorm-3e-3-1 and out/rmsnorm-3e-3-1, from config/course/norms.py.
"""
import os
import statistics
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import torch

from configurator import load_checkpoint
from data.dataset import load_dataset
from data.pretrained import load_model
from model import GPT
from train import batch_starts, get_batch

BATCH_SIZE = 64
WARM_UP = 5                           # rounds that are not measured


def parameter_gradient_norm(module):
    """The norm of the gradients of all parameters of a module together."""
    norms = [p.grad.norm() for p in module.parameters()]
    return torch.stack(norms).norm().item()


def gradient_norms(model, x, y):
    """{part of the model: its gradient norm} for the embedding, each block and the last norm."""
    model.zero_grad()
    _, loss = model(x, y)
    loss.backward()
    norms = {'embedding': parameter_gradient_norm(model.wte)}
    for i, block in enumerate(model.h):
        norms[f'block {i}'] = parameter_gradient_norm(block)
    norms['last norm'] = parameter_gradient_norm(model.ln_f)
    return norms


def step_times(models, x, y, rounds=60):
    """{name: median milliseconds of forward and backward}; the models take turns."""
    times = {name: [] for name in models}
    for _ in range(WARM_UP + rounds):
        for name, model in models.items():
            start = time.perf_counter()
            _, loss = model(x, y)
            loss.backward()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(measured[WARM_UP:]) for name, measured in times.items()}


def main():
    folders = ['out/layernorm-3e-3-1', 'out/rmsnorm-3e-3-1']
    for i, folder in enumerate(sys.argv[1:3]):
        folders[i] = folder

    # 1. The trained models, by their kind of norm, and new models of the same sizes.
    trained = {}
    fresh = {}
    for folder in folders:
        checkpoint = load_checkpoint(folder)
        config = checkpoint['config']
        model, _ = load_model(checkpoint, {})
        name = model.config.norm
        trained[name] = model.train()
        torch.manual_seed(1)
        fresh[name] = GPT(model.config)

    # 2. One batch of training data for all of them.
    data, _, _, _ = load_dataset(config['dataset'], config['block_size'], config['tokenizer'],
                                 config['vocab_size'])
    starts = batch_starts(len(data), config['block_size'], BATCH_SIZE,
                          torch.Generator().manual_seed(0))
    x, y = get_batch(data, starts, config['block_size'], model.config.vocab_size)

    # 3. Gradients and times.
    for when, models in (('new', fresh), ('trained', trained)):
        for name, model in models.items():
            norms = gradient_norms(model, x, y)
            parts = [f'{part} {norm:.3f}' for part, norm in norms.items()]
            print(f'{when:>8}, {name:>9}: gradient norm', ', '.join(parts))
    times = step_times(trained, x, y)
    for name, ms in times.items():
        print(f'forward and backward, {name}: {ms:.1f} ms')
    print(f"rmsnorm / layernorm {times['rmsnorm'] / times['layernorm']:.2f}")


if __name__ == '__main__':
    main()
