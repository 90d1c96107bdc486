"""
Draw the loss mask over a chat: a column per token, which is grey where the loss does not count the
token. The height of a column is what the model of a run loses on its token.

    python assets/draw_mask.py --out_dir=out/sft --out=out/mask.png
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch
from torch.nn import functional as F

from bpe import render_chat
from configurator import configure
from data.pretrained import load_model

# -----------------------------------------------------------------------------
out_dir = 'out/sft'                     # folder of the run
chat = 'Spell dream backwards.|maerd|Say dream twice.|dream dream'  # user|assistant|user|assistant
out = 'out/mask.png'                    # picture to write
# -----------------------------------------------------------------------------


def read_turns(text):
    """
    The messages of a chat that is written as user|assistant|user|assistant ...

    >>> read_turns('Hi?|Yes')
    [{'role': 'user', 'content': 'Hi?'}, {'role': 'assistant', 'content': 'Yes'}]
    """
    messages = []
    for i, content in enumerate(text.split('|')):
        role = 'assistant' if i % 2 else 'user'
        messages.append({'role': role, 'content': content})
    return messages


@torch.no_grad()
def token_losses(model, ids):
    """The loss of each token but the first, in nats: minus the log of the probability that the
    model gives it after the tokens before it. Returns a tensor of len(ids) - 1 numbers."""
    ids = torch.tensor([ids])
    logits, _ = model.eval()(ids[:, :-1])
    return F.cross_entropy(logits[0], ids[0, 1:], reduction='none')


def draw(labels, mask, losses, path):
    """Draw a column per token: its label, its loss, and whether the loss counts it."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(0.19 * len(labels) + 1, 3.2), layout='constrained')
    axis = figure.add_subplot()
    kinds = [(0, '#cbd5e1', 'mask 0: prompt and markers, not counted'),
             (1, '#2563eb', 'mask 1: response and its end token, counted')]
    for kind, color, name in kinds:
        columns = [i for i in range(len(labels)) if mask[i] == kind]
        axis.bar(columns, [losses[i] for i in columns], color=color, label=name)
        for i in columns:
            axis.axvspan(i - 0.5, i + 0.5, color=color, alpha=0.2, linewidth=0)
    axis.set_xticks(range(len(labels)), labels, fontsize=8, family='monospace')
    for i, label in enumerate(labels):
        if len(label) > 1:  # the name of a special token
            axis.get_xticklabels()[i].set_rotation(90)
    axis.set_xlim(-0.5, len(labels) - 0.5)
    axis.set_xlabel('token to be predicted')
    axis.set_ylabel('loss of the token (nats)')
    figure.legend(loc='outside upper center', ncols=2, fontsize='small')
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    figure.savefig(path, dpi=80)


if __name__ == '__main__':
    configure(globals())
    model, tok = load_model(out_dir, {})
    ids, mask = render_chat(read_turns(chat), tok)
    losses = token_losses(model, ids).tolist()
    # Nothing predicts the first token. A blank is shown as a sign, so that it is visible.
    labels = [tok.decode([id]).replace(' ', '·') for id in ids[1:]]
    counted = [loss for loss, kind in zip(losses, mask[1:]) if kind]
    print(f'{len(labels)} tokens, {sum(losses) / len(losses):.3f} nats each; '
          f'{len(counted)} are counted, {sum(counted) / len(counted):.3f} nats each')
    draw(labels, mask[1:], losses, out)
    print(f'wrote {out}')
