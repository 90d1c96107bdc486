"""
Draw how temperature, top-k and top-p change one distribution: the probabilities of the next token
after a text, as a trained model predicts them. The bars are the probabilities that are sampled
from, the grey outlines those that the model predicts.

    python assets/draw_sampling.py --out_dir=out/small
    python assets/draw_sampling.py --out_dir=out/base --text="My lord" --out=out/sampling.png
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch

from configurator import configure
from data.pretrained import load_model
from model import sampling_probs

# -----------------------------------------------------------------------------
out_dir = 'out/small'                   # folder of the run
text = 'My lord, '                       # text to continue
n_tokens = 20                           # tokens to show, the most probable ones
out = 'out/sampling.png'                # picture to write
# -----------------------------------------------------------------------------

# The settings of each panel, as sampling_probs takes them.
VARIANTS = [
    {'temperature': 0.5}, {'temperature': 1.0}, {'temperature': 2.0},
    {'top_k': 5}, {'top_p': 0.8}, {'temperature': 2.0, 'top_p': 0.8},
]


@torch.no_grad()
def next_token_logits(model, ids):
    """The logits (1, V) of the token after the ids."""
    logits, _ = model.eval()(torch.tensor([ids]))
    return logits[:, -1].float()


def visible_label(tok, token):
    """The text of a token, with visible characters in place of a space and a line end."""
    return tok.decode([token]).replace(' ', '·').replace('\n', '¶')


def describe(probs):
    """One line about a distribution (V,): how many tokens it allows, and the most probable one."""
    n_allowed = (probs > 0).sum().item()
    return f'{n_allowed:3} tokens allowed, the largest probability is {probs.max():.3f}'


def draw_distributions(logits, tok, n_tokens, path):
    """Draw a panel for each of VARIANTS; the tokens are in the same order in all of them."""
    from matplotlib.figure import Figure
    predicted = logits.softmax(dim=-1)[0]                             # (V,)
    tokens = predicted.argsort(descending=True)[:n_tokens]
    labels = [visible_label(tok, token) for token in tokens.tolist()]
    figure = Figure(figsize=(12, 5.4), layout='constrained')
    for i, settings in enumerate(VARIANTS):
        sampled = sampling_probs(logits, **settings)[0]               # (V,)
        name = ', '.join(f'{key} {value}' for key, value in settings.items())
        print(f'{name:>28}: {describe(sampled)}')
        shared = figure.axes[0] if figure.axes else None
        axis = figure.add_subplot(2, 3, i + 1, title=name, sharey=shared)
        axis.bar(labels, sampled[tokens], color='C0', label='sampled from')
        axis.bar(labels, predicted[tokens], fill=False, edgecolor='gray', label='predicted')
        axis.tick_params(axis='x', labelfontfamily='monospace')  # there I and l differ
        axis.grid(axis='y', alpha=0.3)
    figure.axes[0].legend()
    figure.supxlabel(f'next token after "{text}"')
    figure.supylabel('probability')
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    figure.savefig(path, dpi=80)


if __name__ == '__main__':
    configure(globals())
    model, tok = load_model(out_dir, {})
    logits = next_token_logits(model, tok.encode(text))
    draw_distributions(logits, tok, n_tokens, out)
    print(f'wrote {out}')
