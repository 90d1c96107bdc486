"""
LayerNorm beside RMSNorm: the norm of the loss's gradient at each layer, at the start and in trained models, and the time
of a training step, the two taking turns in one run.

    python tests/bench_norm.py [LAYERNORM RUN] [RMSNORM RUN]      defaults: out/layernorm-1 out/rmsnorm-1
"""
import os, statistics, sys, time
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import torch
from configurator import load_checkpoint
from data.dataset import load_dataset
from data.pretrained import load_model
from model import GPT
from train import batch_starts, get_batch

def gradient_norms(model, x, y):
    """The gradient's norm over the parameters of the embedding, of each block, and of the last norm."""
    model.zero_grad()
    model(x, y)[1].backward()
    parts = {'embedding': model.wte, **{f'block {i}': block for i, block in enumerate(model.h)}, 'last norm': model.ln_f}
    return {name: torch.stack([p.grad.norm() for p in part.parameters()]).norm().item() for name, part in parts.items()}

def step_times(models, x, y, rounds=60):
    """Median milliseconds of forward and backward of each, taking turns."""
    times = {name: [] for name in models}
    for _ in range(rounds + 5):
        for name, model in models.items():
            began = time.perf_counter()
            model(x, y)[1].backward()
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(t[5:]) for name, t in times.items()}

if __name__ == '__main__':
    folders = (sys.argv[1:] + ['out/layernorm-1', 'out/rmsnorm-1'][len(sys.argv) - 1:])[:2]
    trained = {}
    for folder in folders:
        checkpoint = load_checkpoint(folder)
        trained[checkpoint['model_args']['norm']], config = load_model(checkpoint, {})[0].train(), checkpoint['config']
    data, _, _, _ = load_dataset(config['dataset'], config['block_size'], config['tokenizer'], config['vocab_size'])
    x, y = get_batch(data, batch_starts(len(data), 0, config | {'batch_size': 64}), config['block_size'], 2**31)
    fresh = {}
    for name, model in trained.items():
        torch.manual_seed(1)
        fresh[name] = GPT(model.config)
    for when, models in (('at the start', fresh), ('trained', trained)):
        for name, model in models.items():
            norms = gradient_norms(model, x, y)
            print(f'{when:>12}, {name:>9}: gradient', ', '.join(f'{part} {norm:.3f}' for part, norm in norms.items()))
    times = step_times(trained, x, y)
    print('forward and backward:', ', '.join(f'{name} {ms:.1f} ms' for name, ms in times.items()),
          f"rmsnorm / layernorm {times['rmsnorm'] / times['layernorm']:.2f}")
