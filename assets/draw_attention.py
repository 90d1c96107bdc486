"""
Draw what the attention heads of a trained model look at: one map per layer and head. A row is
the token that attends, a column is the token attended to, and a darker square is a larger weight.

    python assets/draw_attention.py --out_dir=out/attention
    python assets/draw_attention.py --out_dir=out/base --text="A horse, a horse" --out=out/maps.png
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch

from configurator import configure
from data.pretrained import load_model
from model import attention, rope_frequencies, rope_table, rotate, visible

# -----------------------------------------------------------------------------
out_dir = 'out/attention'               # folder of the run
text = 'a rose, a rose, a rose'         # text to read
out = 'out/attention.png'               # picture to write
# -----------------------------------------------------------------------------


def record_projections(model, ids):
    """
    Run the model on the token ids and record what each layer's c_attn computes: the queries, keys
    and values of all heads, side by side, a tensor (T, (nh + 2 nkv) hs) per layer.
    """
    projections = []

    # A forward hook is called with the output of its module, here (1, T, (nh + 2 nkv) hs).
    def record(module, inputs, output):
        projections.append(output[0])

    hooks = [block.attn.c_attn.register_forward_hook(record) for block in model.h]
    try:
        model.hidden(torch.tensor([ids]))
    finally:
        for hook in hooks:
            hook.remove()
    return projections


def attention_weights(layer, projection, config):
    """
    The attention weights of one layer.

    Args:
        layer: the layer's Attention module, for its norms of queries and keys.
        projection: (T, (nh + 2 nkv) hs), from `record_projections`.

    Returns:
        (nh, T, T): for each head, a row per query and a column per key. Every row sums to 1.
    """
    # 1. Split the projection into heads. With GQA there are fewer key than query heads.
    nh = config.n_head
    nkv = config.kv_heads
    heads = projection.unflatten(-1, (nh + 2 * nkv, config.head_size))
    heads = heads.transpose(0, 1)[None]                               # (1, heads, T, hs)
    q, k, _ = heads.split([nh, nkv, nkv], dim=1)
    T = q.size(2)

    # 2. Queries and keys as the layer prepares them: normalised, then rotated to their positions.
    if config.qk_norm:
        q = layer.q_norm(q)
        k = layer.k_norm(k)
    positions = torch.arange(T)[None]                                           # (1, T)
    if config.pos == 'rope':
        rope = rope_table(positions, rope_frequencies(config))
        q = rotate(q, rope)
        k = rotate(k, rope)

    # 3. Attention returns weights @ v. With the identity as v, that is the weights themselves.
    window = config.window_size
    mask = visible(positions, positions, window, config.n_sink, config.causal)  # (1, T, T)
    identity = torch.eye(T).expand(1, nkv, T, T)
    return attention(q, k, identity, mask)[0]


@torch.no_grad()
def attention_maps(model, ids):
    """
    The attention weights of every layer for a text.

    Args:
        model: a GPT on the CPU, in float32. It is set to evaluation mode.
        ids: token ids, at most block_size.

    Returns:
        A list of tensors (nh, T, T), one per layer. ValueError if there are too many tokens.
    """
    config = model.config
    if not 1 <= len(ids) <= config.block_size:
        raise ValueError(f'the text has {len(ids)} tokens; '
                         f'the model reads 1 to {config.block_size} (block_size)')
    projections = record_projections(model.eval(), ids)
    maps = []
    for block, projection in zip(model.h, projections):
        maps.append(attention_weights(block.attn, projection, config))
    return maps


def describe(weights):
    """One line about the map (T, T) of a head: where, on average, its weight goes."""
    T = len(weights)
    positions = torch.arange(T)
    distance = positions[:, None] - positions                                   # (T, T)
    back = (weights * distance).sum() / T
    itself = weights.diagonal().mean()
    previous = weights.diagonal(-1).sum() / T
    first = weights[:, 0].mean()
    return (f'looks {back:5.2f} tokens back on average; weight {itself:.2f} on the token itself, '
            f'{previous:.2f} on the previous token, {first:.2f} on the first token')


def draw_maps(maps, labels, path):
    """Draw the maps of all layers (rows) and heads (columns); labels: one per token."""
    from matplotlib.figure import Figure
    n_layer = len(maps)
    n_head = len(maps[0])
    ticks = range(len(labels))
    figure = Figure(figsize=(2.4 * n_head, 2.55 * n_layer), layout='constrained')
    for layer, heads in enumerate(maps):
        for head, weights in enumerate(heads):
            # Subplots are numbered from 1, row by row.
            axis = figure.add_subplot(n_layer, n_head, layer * n_head + head + 1)
            axis.set_title(f'layer {layer}, head {head}', fontsize=9)
            image = axis.imshow(weights.numpy(), cmap='Blues', vmin=0, vmax=1)
            axis.set_xticks(ticks, labels, fontsize=7)
            axis.set_yticks(ticks, labels, fontsize=7)
    figure.supxlabel('token attended to (key)')
    figure.supylabel('token that attends (query)')
    figure.colorbar(image, ax=figure.axes, label='attention weight', shrink=0.6)
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    figure.savefig(path, dpi=90)


if __name__ == '__main__':
    configure(globals())
    model, tok = load_model(out_dir, {})
    ids = tok.encode(text)
    maps = attention_maps(model, ids)
    for layer, heads in enumerate(maps):
        for head, weights in enumerate(heads):
            print(f'layer {layer}, head {head}: {describe(weights)}')
    # Blanks and line ends are shown as signs, so that every label is visible.
    labels = [tok.decode([i]).replace(' ', '·').replace('\n', '¶') for i in ids]
    draw_maps(maps, labels, out)
    print(f'wrote {out}')
