"""
A trained model reads a text a hundred times as long as its block_size, with four caches: perplexity and memory.

    python tests/bench_stream.py [RUN'S FOLDER] [PICTURE]       defaults: out/base assets/streaming.png

- windows, recomputed: no cache; each token is predicted from block_size tokens read anew. What is to be reached.
- sinks: the first tokens stay, and slide along with a window that fills the rest of block_size (arXiv 2309.17453).
- no sinks: the same window alone.
- nothing dropped: every key stays, at distances that were never trained on, and the cache grows.
"""
import dataclasses, math, os, sys
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import torch
from torch.nn import functional as F
from configurator import load_checkpoint
from data.dataset import load_dataset
from data.pretrained import load_model
from model import GPT, GPTConfig

def with_config(model, **changes):
    """The same weights under other flags."""
    other = GPT(dataclasses.replace(model.config, **changes)).eval()
    other.load_state_dict(model.state_dict())
    return other

@torch.no_grad()
def streamed(model, ids, chunk=64):
    """(loss of each token after the first, in nats; bytes that the cache held after each chunk)."""
    cache, losses, held = model.new_cache(1), [], []
    for i in range(0, len(ids) - 1, chunk):
        x, y = ids[i:i + chunk], ids[i + 1:i + 1 + chunk]
        logits, _ = model(x[None, :len(y)], cache=cache)
        losses.append(F.cross_entropy(logits[0].float(), y, reduction='none'))
        held.append(cache.k.nbytes + cache.v.nbytes + cache.pos.nbytes)
    return torch.cat(losses), held

@torch.no_grad()
def recomputed(model, ids):
    """The loss of each token after the first block, predicted from the block_size tokens before it."""
    T, losses = model.config.block_size, []
    windows = ids.unfold(0, T + 1, 1)
    for w in windows.split(128):
        logits = model.lm_head(model.hidden(w[:, :-1])[:, -1]).float()
        losses.append(F.cross_entropy(logits, w[:, -1], reduction='none'))
    return torch.cat(losses)

if __name__ == '__main__':
    folder, picture = (sys.argv[1:] + ['out/base', 'assets/streaming.png'][len(sys.argv) - 1:])[:2]
    checkpoint = load_checkpoint(folder)
    config = checkpoint['config']
    model, tok = load_model(checkpoint, {})
    model.eval()
    T = model.config.block_size
    _, val, _, _ = load_dataset(config['dataset'], T, config['tokenizer'], config['vocab_size'])
    ids = torch.from_numpy(val[:100 * T + 1].astype('int64'))
    print(f'{folder}: block_size {T}, {len(ids) - 1:,} tokens of held-out text')
    runs = {'sinks (4)': with_config(model, n_sink=4), 'no sinks': model,
            'nothing dropped': with_config(model, block_size=100 * T)}
    curves = {'windows, recomputed': recomputed(model, ids)}
    target = math.exp(curves['windows, recomputed'].mean())
    print(f"{'windows, recomputed':>20}: perplexity {target:8.3f}")
    for name, other in runs.items():
        losses, held = streamed(other, ids)
        curves[name] = losses[T - 1:]
        perplexity = math.exp(curves[name].mean())
        print(f'{name:>20}: perplexity {perplexity:8.3f}, {100 * (perplexity / target - 1):+6.1f}%; cache of {held[0]:,} bytes '
              f'at the start, {held[-1]:,} at the end')
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(8, 4.5), layout='constrained')
    for name, losses in curves.items():
        bins = losses[:len(losses) // T * T].view(-1, T).mean(1)
        smooth = bins[:len(bins) // 5 * 5].view(-1, 5).mean(1).exp()
        axis.plot([T * 5 * (i + 0.5) for i in range(len(smooth))], smooth, label=name)
    axis.set(title=f'Reading past block_size {T}', xlabel='tokens read', ylabel='perplexity', yscale='log')
    axis.legend()
    axis.grid(alpha=0.3)
    os.makedirs(os.path.dirname(picture) or '.', exist_ok=True)
    figure.savefig(picture, dpi=80)
    print('drawn:', picture)
