"""
What the heads of a trained model look at: a map for each layer and head, a row the token that looks, a column the token
that is seen, the darker the more of its weight.

    python assets/attention.py --out_dir=out/attention
    python assets/attention.py --out_dir=out/base --text="A horse, a horse, my kingdom for a horse" --out=maps.png
"""
import os, sys
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch
import model as transformer
from configurator import configure
from data.pretrained import load_model

# -----------------------------------------------------------------------------
out_dir = 'out/attention'                 # folder of the run
text = 'a rose, a rose, a rose'           # what is read
out = 'assets/attention.png'              # the picture to write
# -----------------------------------------------------------------------------

def attention_maps(gpt, ids):
    """The weights (nh, T, T) of every layer that reads ids (T): attention over values that are the identity."""
    maps, attention = [], transformer.attention
    def recording(q, k, v, mask, dropout=0.0):
        maps.append(attention(q, k, torch.eye(k.size(2)).expand(*k.shape[:2], -1, -1), mask)[0])
        return attention(q, k, v, mask, dropout)
    gpt.config.attn, transformer.attention = 'manual', recording
    try:
        with torch.no_grad():
            gpt.eval().hidden(torch.tensor([ids]))
    finally:
        transformer.attention = attention
    return maps

if __name__ == '__main__':
    configure(globals())
    gpt, tok = load_model(out_dir, {})
    ids = tok.encode(text)
    maps, T = attention_maps(gpt, ids), len(ids)
    labels = [tok.decode([i]).replace(' ', '·').replace('\n', '¶') for i in ids]
    from matplotlib.figure import Figure
    rows, columns = len(maps), len(maps[0])
    figure = Figure(figsize=(2.4 * columns, 2.55 * rows), layout='constrained')
    for layer, heads in enumerate(maps):
        for head, weights in enumerate(heads):
            back = (weights * (torch.arange(T)[:, None] - torch.arange(T))).sum() / T
            print(f'layer {layer}, head {head}: looks {back:5.2f} tokens back on average, {weights.diagonal().mean():.2f} of '
                  f'its weight on the token itself, {weights.diagonal(-1).sum() / T:.2f} on the one before, '
                  f'{weights[:, 0].mean():.2f} on the first')
            axis = figure.add_subplot(rows, columns, layer * columns + head + 1)
            axis.set_title(f'layer {layer}, head {head}', fontsize=9)
            axis.imshow(weights, cmap='Blues', vmin=0, vmax=1)
            axis.set_xticks(range(T), labels, fontsize=7)
            axis.set_yticks(range(T), labels, fontsize=7)
    figure.supxlabel('token that is seen')
    figure.supylabel('token that looks')
    figure.savefig(out, dpi=90)
    print('drawn:', out)
