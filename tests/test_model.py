"""
What model.py promises. Independent of it: closed forms and published formulas, plain loops, a small GPT written
in numpy from those formulas (`slow_gpt`, below), and PyTorch's own optimizer and counter of operations.
"""
import itertools, math
from dataclasses import asdict
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import model
from data.pretrained import resize_vocab
from model import (GPT, GPTConfig, Linear, MoE, Muon, ScalarHead, attention, local_attention, orthogonalize,
                   rope_table, rotate, sampling_probs, sinusoidal, visible)

SMALL = dict(block_size=16, vocab_size=11, n_layer=2, n_head=4, n_embd=16)
GPT2 = dict(norm='layernorm', pos='learned', mlp='gelu', bias=True)


def small_gpt(seed=0, **flags):
    """A small model whose weights are not those of the start: its queries prefer some keys, its router some experts."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SMALL | flags))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * p.size(1) ** -0.5 if p.dim() > 1 else p + 0.2 * torch.randn(p.shape))
    return model.eval()


def some_ids(*shape, seed=0, vocab_size=SMALL['vocab_size']):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-4):
    a, b = (torch.as_tensor(x).detach().double() for x in (a, b))
    return a.shape == b.shape and bool((a - b).abs().max() < tolerance)


def largest_gap(a, b):
    return (a - b).abs().max().item()


# A GPT in numpy and plain loops, for one sequence at a time: every formula where it is used

def linear(layer, x):
    y = x @ layer.weight.detach().double().numpy().T
    return y if layer.bias is None else y + layer.bias.detach().double().numpy()


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def normed(layer, x, kind, eps):
    if kind == 'layernorm':
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + eps) * layer.weight.detach().double().numpy()
    bias = getattr(layer, 'bias', None)
    return x if bias is None else x + bias.detach().double().numpy()


def may_look(p, k, c):
    """May the query at position p look at the key at position k?"""
    window = c.window or c.block_size - c.n_sink
    return not c.causal or k <= p and (p - k < window or k < c.n_sink)


def score(query, key, p, k, c):
    """The dot product of a query at position p and a key at k, under RoPE as complex numbers turned by the
    distance. Past block_size the sinks are seen from the last position that was trained on."""
    if c.pos != 'rope':
        return query @ key
    distance = (min(p, c.block_size - 1) if k < c.n_sink else p) - k
    angle = distance / c.rope_base ** (np.arange(0, c.head_dim, 2) / c.head_dim)
    a, b = (x[:c.head_dim // 2] + 1j * x[c.head_dim // 2:] for x in (query, key))
    return (a * b.conj() * np.exp(1j * angle)).sum().real


def slow_attention(layer, x, c):
    T, hs = len(x), c.head_dim
    q, k, v = np.split(linear(layer.c_attn, x), [c.n_head * hs, (c.n_head + c.n_kv_head) * hs], axis=1)
    out = np.zeros_like(q)
    for head in range(c.n_head):
        own, shared = slice(head * hs, (head + 1) * hs), head // (c.n_head // c.n_kv_head) * hs
        queries, keys, values = q[:, own], k[:, shared:shared + hs], v[:, shared:shared + hs]
        if c.qk_norm:
            queries = normed(layer.q_norm, queries, 'rmsnorm', c.norm_eps)
            keys = normed(layer.k_norm, keys, 'rmsnorm', c.norm_eps)
        for p in range(T):
            seen = [j for j in range(T) if may_look(p, j, c)]
            scores = np.array([score(queries[p], keys[j], p, j, c) for j in seen]) / math.sqrt(hs)
            out[p, own] = softmax(scores) @ values[seen]
    return linear(layer.c_proj, out)


def slow_mlp(layer, x, c):
    h = linear(layer.c_fc, x)
    if c.mlp == 'swiglu':
        gate, up = np.split(h, 2, axis=-1)
        h = gate / (1 + np.exp(-gate)) * up
    elif c.mlp == 'relu2':
        h = np.maximum(h, 0) ** 2
    else:
        h = h / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))
    return linear(layer.c_proj, h)


def slow_moe(layer, x, c):
    out = np.zeros_like(x)
    for t, logits in enumerate(linear(layer.router, x)):
        best = np.argsort(-logits)[:c.n_expert_active]
        for share, e in zip(softmax(logits[best]), best):
            out[t] += share * slow_mlp(layer.experts[e], x[t], c)
    return out


def slow_block(block, x, c):
    x = x + slow_attention(block.attn, normed(block.ln_1, x, c.norm, c.norm_eps), c)
    mlp = slow_moe if isinstance(block.mlp, MoE) else slow_mlp
    return x + mlp(block.mlp, normed(block.ln_2, x, c.norm, c.norm_eps), c)


def slow_gpt(model, ids):
    """The logits (T, V) of a list of ids."""
    c = model.config
    x = model.wte.weight.detach().double().numpy()[ids]
    if c.pos == 'learned':
        x = x + model.wpe.weight.detach().double().numpy()[:len(ids)]
    if c.pos == 'sinusoidal':
        x = x * math.sqrt(c.n_embd)
        for p, i in itertools.product(range(len(ids)), range(c.n_embd)):
            x[p, i] += (math.cos if i % 2 else math.sin)(p / 10000 ** (i // 2 * 2 / c.n_embd))
    for block in model.h:
        x = slow_block(block, x, c)
    return linear(model.lm_head, normed(model.ln_f, x, c.norm, c.norm_eps))


def run_part(model, part, x):
    """What a part of the model (a block, or its attention) makes of x (B, T, C) in place of its own input."""
    seen = []
    hooks = [part.register_forward_pre_hook(lambda _, args: (x, *args[1:])),
             part.register_forward_hook(lambda _, args, output: seen.append(output))]
    model(torch.zeros(x.shape[:2], dtype=torch.long))
    for hook in hooks:
        hook.remove()
    return seen[0]


# Positions

def test_sinusoidal_positions_are_the_papers_formula():
    C, table = 12, sinusoidal(torch.arange(100), 12)
    for p, i in itertools.product(range(100), range(C // 2)):
        assert abs(table[p, 2 * i] - math.sin(p / 10000 ** (2 * i / C))) < 1e-5
        assert abs(table[p, 2 * i + 1] - math.cos(p / 10000 ** (2 * i / C))) < 1e-5


def test_rope_turns_pairs_as_complex_numbers_turn():
    x, pos, base = torch.randn(2, 3, 5, 8), torch.tensor([0, 1, 7, 100, 5000]), 500.0
    turned = rotate(x, rope_table(pos[None], 8, base))
    as_complex = lambda x: x[..., :4].double().numpy() + 1j * x[..., 4:].double().numpy()
    angle = pos.numpy()[:, None] / base ** (np.arange(4) * 2 / 8)
    assert np.abs(as_complex(turned) - as_complex(x) * np.exp(1j * angle)).max() < 1e-5
    assert close(turned.norm(dim=-1), x.norm(dim=-1), 1e-5)
    assert close(turned[:, :, 0], x[:, :, 0], 1e-7)  # at position 0 nothing turns


def test_a_rope_score_depends_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 32).unbind()
    score_at = lambda p, j: (rotate(q, rope_table(torch.tensor([[p]]), 32, 1e4))
                             * rotate(k, rope_table(torch.tensor([[j]]), 32, 1e4))).sum()
    for distance in (0, 1, 9, 200):
        scores = torch.stack([score_at(start + distance, start) for start in (0, 1, 50, 3000)])
        assert close(scores, scores[:1].expand(4), 1e-4)
    assert largest_gap(score_at(9, 0), score_at(10, 0)) > 1e-2


# Attention

def test_attention_of_three_tokens_number_by_number():
    """One head of size 2 over three tokens; follow it with pencil and paper."""
    model = GPT(GPTConfig(block_size=3, vocab_size=3, n_layer=1, n_head=1, n_embd=2, pos='learned'))
    layer = model.h[0].attn
    x = torch.tensor([[1., 0.], [0., 1.], [1., 1.]])     # the three tokens
    with torch.no_grad():
        layer.c_attn.weight.copy_(torch.tensor([
            [2., 0.], [0., 1.],                          # queries: the first channel doubled
            [0., 1.], [1., 0.],                          # keys: the channels exchanged
            [10., 0.], [0., 20.]]))                      # values: 10 times the first, 20 times the second
        layer.c_proj.weight.copy_(torch.tensor([[1., 1.],    # the output: the sum of the two channels,
                                                [1., -1.]]))  # and their difference
    # queries      keys         values
    # 1: (2, 0)    1: (0, 1)    1: (10,  0)
    # 2: (0, 1)    2: (1, 0)    2: ( 0, 20)
    # 3: (2, 1)    3: (1, 1)    3: (10, 20)
    #
    # scores, query . key; a token does not see those after it:
    #   1: 2*0 + 0*1 = 0
    #   2: 0*0 + 1*1 = 1    0*1 + 1*0 = 0
    #   3: 2*0 + 1*1 = 1    2*1 + 1*0 = 2    2*1 + 1*1 = 3
    # divided by the root of the head size, 1.41421:
    #   1: 0
    #   2: 0.70711   0
    #   3: 0.70711   1.41421   2.12132
    # exp:                                   sum:
    #   1: 1                                  1
    #   2: 2.02811   1                        3.02811
    #   3: 2.02811   4.11325   8.34214       14.48350
    # weights, each row divided by its sum:
    #   1: 1
    #   2: 0.66976   0.33024
    #   3: 0.14003   0.28400   0.57598
    # the values, so weighted:
    #   1: 1 * (10, 0)                                                      = (10,      0)
    #   2: 0.66976 * (10, 0) + 0.33024 * (0, 20)                            = ( 6.6976, 6.6048)
    #   3: 0.14003 * (10, 0) + 0.28400 * (0, 20) + 0.57598 * (10, 20)       = ( 7.1601, 17.1996)
    # their sum and their difference:
    expected = [[10., 10.], [13.3024, 0.0928], [24.3597, -10.0395]]
    for model.config.attn in ('manual', 'sdpa'):
        assert close(run_part(model, layer, x[None])[0], torch.tensor(expected), 1e-3)


HEADS = {'one head': dict(n_head=1), 'many heads': dict(n_head=4), 'grouped queries': dict(n_head=4, n_kv_head=2),
         'one key head for all': dict(n_head=4, n_kv_head=1), 'heads of their own size': dict(n_head=3, head_dim=6),
         'normed queries and keys': dict(qk_norm=True, n_kv_head=2), 'biases': dict(bias=True),
         'qkv biases': dict(qkv_bias=True), 'window': dict(window=3),
         'window and sinks': dict(window=3, n_sink=2, n_kv_head=2), 'encoder': dict(causal=False)}


@pytest.mark.parametrize('pos', ['learned', 'rope'])
@pytest.mark.parametrize('flags', HEADS.values(), ids=HEADS)
def test_attention_and_block_equal_numpy(flags, pos):
    model, x = small_gpt(pos=pos, **flags), torch.randn(2, 9, 16)
    block, c = model.h[1], model.config
    for model.config.attn in ('manual', 'sdpa', 'auto'):
        attended, whole = run_part(model, block.attn, x), run_part(model, block, x)
        for row in range(2):
            assert close(attended[row], slow_attention(block.attn, x[row].double().numpy(), c))
            assert close(whole[row], slow_block(block, x[row].double().numpy(), c))


KINDS = list(itertools.product(('layernorm', 'rmsnorm'), ('learned', 'sinusoidal', 'rope'), ('gelu', 'swiglu', 'relu2')))


@pytest.mark.parametrize('n_expert', [0, 3])
@pytest.mark.parametrize('norm, pos, mlp', KINDS)
def test_the_whole_model_equals_numpy(norm, pos, mlp, n_expert):
    model = small_gpt(norm=norm, pos=pos, mlp=mlp, n_expert=n_expert, n_kv_head=2, bias=n_expert == 0, moe_every=2)
    ids = some_ids(16).tolist()
    assert close(model(torch.tensor([ids]))[0][0], slow_gpt(model, ids), 1e-3)


def test_who_sees_whom_is_the_rule_in_plain_words():
    for T, window, n_sink in itertools.product((1, 2, 7, 12), (1, 3, 12), (0, 1, 4)):
        mask = visible(torch.arange(T), torch.arange(T), window, n_sink)
        for q, k in itertools.product(range(T), range(T)):
            assert mask[q, k] == (k <= q and (q - k < window or k < n_sink)), (T, window, n_sink, q, k)
    pos = torch.tensor([[-1, -1, 0, 1], [0, 1, 2, 3]])  # two rows, the first with two tokens of padding
    for causal, row in ((True, [[False, False, True, False], [False, False, True, True]]),
                        (False, [[False, False, True, True]] * 2)):
        assert visible(pos, pos, 4, 0, causal)[0, 2:].tolist() == row
        assert visible(pos, pos, 4, 0, causal).any(-1).all()  # a softmax over nothing would be NaN


def naive_mask(T, window, n_sink):
    return torch.tensor([[k <= q and (q - k < window or k < n_sink) for k in range(T)] for q in range(T)])


def gradients(y, *inputs):
    torch.manual_seed(1)
    return torch.autograd.grad((y * torch.randn(y.shape)).sum(), inputs)


@pytest.mark.parametrize('nh, nkv', [(1, 1), (4, 4), (4, 2), (4, 1)])
def test_local_attention_equals_attention_under_the_windows_mask(nh, nkv):
    """Forward and gradients; T a multiple of the window or not, shorter than the sinks or not."""
    for T, window, n_sink in itertools.product((1, 4, 7, 23, 24), (1, 3, 8, 30), (0, 1, 5)):
        torch.manual_seed(T)
        q, k, v = (torch.randn(2, heads, T, 6, requires_grad=True) for heads in (nh, nkv, nkv))
        local, whole = local_attention(q, k, v, window, n_sink), attention(q, k, v, naive_mask(T, window, n_sink))
        assert close(local, whole, 1e-5), (T, window, n_sink)
        for a, b in zip(gradients(local, q, k, v), gradients(whole, q, k, v)):
            assert close(a, b, 1e-5), (T, window, n_sink)


def test_dropout_of_attention_leaves_its_mean_as_it_is():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
    mask = naive_mask(5, 5, 0)
    drawn = torch.stack([attention(q, k, v, mask, dropout=0.5) for _ in range(4000)])
    assert drawn.std(0).mean() > 0.1
    assert ((drawn.mean(0) - attention(q, k, v, mask)).abs() < 5 * drawn.std(0) / 4000 ** 0.5).all()


@pytest.mark.parametrize('attn', ['manual', 'sdpa'])
def test_dropout_acts_in_training_only(attn):
    model, idx = small_gpt(dropout=0.5, attn=attn), some_ids(1, 9)
    same = small_gpt(attn=attn)(idx)[0]
    assert close(model(idx)[0], same, 1e-6)
    assert largest_gap(model.train()(idx)[0], same) > 0.1 and largest_gap(model(idx)[0], model(idx)[0]) > 0.1


WHOLE = {'plain': {}, 'gpt2': GPT2, 'grouped': dict(n_kv_head=1), 'qk_norm': dict(qk_norm=True),
         'encoder': dict(causal=False), 'window': dict(window=5),
         'window and sinks': dict(window=4, n_sink=2, n_kv_head=2, bias=True),
         'sinks': dict(n_sink=3, pos='sinusoidal'), 'experts': dict(n_expert=4), 'short window': dict(window=1, n_sink=12)}


@pytest.mark.parametrize('T', [9, 16, 37])
@pytest.mark.parametrize('flags', WHOLE.values(), ids=WHOLE)
def test_attention_by_hand_equals_pytorchs(flags, T):
    """Logits and gradients of whole models, also past block_size, where the sinks slide."""
    T, results = min(T, 16) if flags == GPT2 else T, []  # learned positions end at block_size
    for attn in ('manual', 'sdpa', 'auto'):
        model = small_gpt(**flags, attn=attn)
        logits, loss = model(some_ids(2, T), some_ids(2, T, seed=1))
        loss.backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    for a, b, c in zip(*results):
        assert close(a, b) and close(a, c)


@pytest.mark.parametrize('norm, pos, mlp', KINDS)
def test_the_future_cannot_be_seen(norm, pos, mlp):
    """Other tokens from position 6 on: the logits before it stay, those from it on change. An encoder sees them all."""
    idx = some_ids(1, 11)
    other = torch.cat((idx[:, :6], (idx[:, 6:] + 1) % 11), dim=1)
    every = itertools.product((4, 2), (False, True), ((0, 0), (3, 0), (3, 2), (0, 2)), (0, 3))
    for (n_kv_head, qk_norm, (window, n_sink), n_expert), attn in zip(every, itertools.cycle(('manual', 'sdpa', 'auto'))):
        flags = dict(norm=norm, pos=pos, mlp=mlp, n_kv_head=n_kv_head, qk_norm=qk_norm, n_expert=n_expert, attn=attn)
        with torch.no_grad():
            model = small_gpt(window=window, n_sink=n_sink, **flags)
            moved = (model(idx)[0] - model(other)[0]).abs().amax((0, 2))
            assert (moved[:6] < 1e-5).all() and (moved[6:] > 1e-3).all(), (flags, window, n_sink, moved)
            if not (window or n_sink):
                encoder = small_gpt(causal=False, **flags)
                assert ((encoder(idx)[0] - encoder(other)[0]).abs().amax((0, 2)) > 1e-4).all(), flags


# Norms and feed-forward layers

def test_rmsnorm_is_its_papers_formula():
    model = small_gpt(qk_norm=True)
    for norm in (model.ln_f, model.h[0].attn.q_norm):
        x = torch.randn(3, *norm.normalized_shape)
        for row, out in zip(x, norm(x)):
            root = math.sqrt(sum(a ** 2 for a in row.tolist()) / len(row) + 1e-5)
            assert close(out, row / root * norm.weight, 1e-5)


def test_swiglu_is_its_papers_formula():
    """(swish(x W) * x V) W2, W and V being the two halves of c_fc."""
    layer, x = small_gpt(mlp='swiglu', n_hidden=6).h[0].mlp, torch.randn(5, 16)
    W, V, W2 = *layer.c_fc.weight.chunk(2), layer.c_proj.weight
    assert W.shape == V.shape == (6, 16) and W2.shape == (16, 6)
    assert close(layer(x), (x @ W.T / (1 + torch.exp(-x @ W.T)) * (x @ V.T)) @ W2.T, 1e-5)


def test_relu2_and_both_gelus_are_their_papers_formulas():
    x = torch.randn(5, 16)
    squared, gelu, tanh = (small_gpt(mlp=mlp).h[0].mlp for mlp in ('relu2', 'gelu', 'gelu_tanh'))
    h = x @ squared.c_fc.weight.T
    assert close(squared(x), torch.where(h > 0, h * h, 0) @ squared.c_proj.weight.T, 1e-5)
    h = x @ gelu.c_fc.weight.T
    exact = h * (1 + torch.erf(h / math.sqrt(2))) / 2  # x * the normal distribution function, which GPT-2's tanh comes near
    assert close(gelu(x), exact @ gelu.c_proj.weight.T, 1e-5)
    h = x @ tanh.c_fc.weight.T
    near = h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3))) / 2
    assert close(tanh(x), near @ tanh.c_proj.weight.T, 1e-5)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize('n_out', [3100, 3001])  # 3,001 rows cannot be shared by two cores
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('native', sorted({False, model.BF16_CPU}))  # a CPU that multiplies in bfloat16 can do without, too
def test_a_linear_layer_that_is_prepared_for_generation_is_the_same_product(monkeypatch, dtype, tolerance, n_out, bias, native):
    torch.manual_seed(0)
    monkeypatch.setattr(model, 'BF16_CPU', native)
    layer, ways = Linear(88, n_out, bias=bias).to(dtype), set()
    for threads, n, shape in itertools.product((1, 2), (1, 4), [(1, 88), (1, 1, 88), (4, 1, 88), (4, 5, 88), (0, 88)]):
        monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        expected = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
        layer.prepare(n)
        ways.add(layer.fast is not None)
        with torch.no_grad():
            y = layer(x)
        assert y.dtype == dtype and (y.numel() == 0 == expected.numel() or close(y, expected, tolerance))
        assert layer(x).requires_grad  # training takes the weight itself
        layer.prepare(0)
        assert layer.fast is None
    assert True in ways or dtype == torch.float64
    small = Linear(24, 11)
    assert small.prepare(4) is None is small.fast  # it would be no faster


@pytest.mark.parametrize('batch', [1, 4])
@pytest.mark.parametrize('how', ['float32', 'bfloat16', 'autocast'])
def test_generation_leaves_no_copy_of_a_weight_behind(monkeypatch, batch, how):
    """The model is large enough for its layers to be prepared; a copy that stayed would not know the changed weights."""
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    gpt = small_gpt(n_embd=256, n_head=4, vocab_size=1100, block_size=32).to(torch.bfloat16 if how == 'bfloat16' else torch.float32)
    layers = [layer for layer in gpt.modules() if isinstance(layer, Linear)]
    prompt, found = torch.randint(1100, (batch, 5)), []
    for _ in range(2):
        with torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'):
            steps = gpt.stream(prompt, 10, temperature=0)
            first = next(steps)
            assert any(layer.fast for layer in layers) == (how == 'float32' or batch > 2 or model.BF16_CPU)
            steps.close()  # whoever stops halfway leaves nothing either
            assert not any(layer.fast for layer in layers)
            idx = gpt.generate(prompt, 10, temperature=0)
        assert torch.equal(idx[:, 5], first) and not any(layer.fast for layer in layers)
        logits, _ = gpt.double()(idx[:, :-1])
        best, said = logits[:, 4:].max(-1).values, logits[:, 4:].gather(-1, idx[:, 5:, None])[..., 0]
        assert (best - said).max() < (1e-4 if how == 'float32' else 0.05) * logits.std()  # the likeliest, but for rounding
        gpt.to(torch.bfloat16 if how == 'bfloat16' else torch.float32)
        found.append(idx)
        with torch.no_grad():
            gpt.lm_head.weight.neg_()
    assert not torch.equal(*found)


@pytest.mark.parametrize('n_embd', [16, 64, 120, 768, 4096])
def test_swiglu_has_the_parameters_of_the_mlp_it_replaces(n_embd):
    count = lambda mlp: sum(p.numel() for p in GPT(GPTConfig(n_layer=1, n_embd=n_embd, mlp=mlp)).h[0].mlp.parameters())
    with torch.device('meta'):
        assert count('gelu') == count('relu2') == 8 * n_embd ** 2
        assert abs(count('swiglu') - 8 * n_embd ** 2) <= 3 * n_embd * 4  # 8/3 C to the nearest multiple of 8
        if n_embd == 768:
            assert count('swiglu') == 8 * 768 ** 2


# Loss and start

def test_the_loss_is_the_formula_of_cross_entropy_and_targets_of_minus_1_are_ignored():
    model, idx, targets = small_gpt(), some_ids(3, 8), some_ids(3, 8, seed=1)
    targets[0, :5], targets[2] = -1, -1
    logits, loss = model(idx, targets)
    nats = [-math.log(softmax(logits[b, t].detach().double().numpy())[targets[b, t]])
            for b, t in itertools.product(range(3), range(8)) if targets[b, t] != -1]
    assert len(nats) == 11 and abs(loss.item() - sum(nats) / 11) < 1e-5
    assert model(idx)[1] is None and close(model(idx)[0], logits, 1e-6)


@pytest.mark.parametrize('pos', ['learned', 'sinusoidal', 'rope'])
def test_before_training_all_tokens_are_equally_likely(pos):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=261, pos=pos))
    idx, targets = some_ids(4, 64, vocab_size=261), some_ids(4, 64, vocab_size=261, seed=1)
    assert abs(model(idx, targets)[1].item() / math.log(261) - 1) < 0.03


@pytest.mark.parametrize('flags', [GPT2, dict(qk_norm=True), dict(n_expert=2, bias=True), dict(tie_weights=False)])
def test_weights_start_as_gpt2_starts_them(flags):
    """N(0, 0.02), but 0.02 / root(2 layers) where a layer adds to the residual stream; biases 0, norms 1."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL | dict(n_layer=8, n_embd=64, vocab_size=300, block_size=64) | flags))
    narrow = 0
    for name, p in model.named_parameters():
        if p.dim() > 1:
            adds = name.endswith('attn.c_proj.weight') or 'mlp' in name and name.endswith('c_proj.weight')
            expected, narrow = 0.02 / 4 if adds else 0.02, narrow + adds
            assert abs(p.std() / expected - 1) < (0.05 if p.numel() > 2000 else 0.3) and abs(p.mean()) < expected / 3, name
        else:
            assert (p == (0 if name.endswith('bias') else 1)).all(), name
    assert narrow == 8 * (1 + max(1, model.config.n_expert))


def test_the_tied_head_is_the_embedding():
    tied, untied = small_gpt(), small_gpt(tie_weights=False)
    assert tied.lm_head.weight is tied.wte.weight and untied.lm_head.weight is not untied.wte.weight
    untied.load_state_dict(tied.state_dict())
    for model in (tied, untied):
        model(some_ids(2, 9), some_ids(2, 9, seed=1))[1].backward()
    assert close(tied.wte.weight.grad, untied.wte.weight.grad + untied.lm_head.weight.grad, 1e-6)
    assert untied.n_params() - tied.n_params() == 11 * 16


@pytest.mark.parametrize('tie_weights', [True, False])
def test_new_tokens_leave_the_old_logits_and_start_at_their_mean(tie_weights):
    model, idx = small_gpt(tie_weights=tie_weights), some_ids(2, 9)
    before = model(idx)[0]
    resize_vocab(model, 14)
    after = model(idx)[0]
    assert close(after[..., :11], before, 1e-5)
    assert close(after[..., 11:], before.mean(-1, keepdim=True).expand(2, 9, 3), 1e-5)
    assert model.config.vocab_size == 14 and (model.lm_head.weight is model.wte.weight) == tie_weights
    resize_vocab(model, 5)  # no fewer
    assert model(idx)[0].shape == (2, 9, 14)


# Counts

def test_gpt2_has_124_439_808_parameters():
    with torch.device('meta'):
        model = GPT(GPTConfig(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768, **GPT2))
    embeddings = 50257 * 768 + 1024 * 768
    attn = 768 * 3 * 768 + 3 * 768 + 768 * 768 + 768
    mlp = 768 * 3072 + 3072 + 3072 * 768 + 768
    assert model.n_params() == embeddings + 12 * (attn + mlp + 4 * 768) + 2 * 768 == 124_439_808
    # 6 for each weight but the position table, and 12 * layers * heads * head size * context for attention
    assert model.flops_per_token(1024) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 12 * 64 * 1024 == 855_166_464


def test_parameters_of_a_grouped_model_with_experts_equal_a_count_by_hand():
    model = small_gpt(n_layer=4, n_kv_head=2, n_hidden=24, n_expert=5, n_expert_active=2, moe_every=2, tie_weights=False)
    attn = 16 * (16 + 8 + 8) + 16 * 16
    expert = 3 * 16 * 24
    dense_layer, sparse_layer = attn + expert + 2 * 16, attn + 5 * expert + 5 * 16 + 2 * 16
    assert model.n_params() == 2 * 11 * 16 + 16 + 2 * dense_layer + 2 * sparse_layer
    assert model.n_params() - model.n_params(active=True) == 2 * 3 * expert


@pytest.mark.parametrize('flags', [dict(), dict(n_kv_head=1, mlp='relu2'), dict(pos='learned', tie_weights=False),
                                   dict(n_expert=4, moe_every=2), dict(n_sink=3), dict(head_dim=40)])
def test_operations_equal_those_pytorch_counts(flags):
    """The formula counts norms too, which are no multiplications of matrices: a percent or two."""
    model = small_gpt(n_embd=64, block_size=32, vocab_size=50, attn='manual', **flags)
    with FlopCounterMode(display=False) as counter:
        model(some_ids(2, 32), some_ids(2, 32))[1].backward()
    assert abs(model.flops_per_token(32) / (counter.get_total_flops() / 64) - 1) < 0.02


def test_a_window_bounds_the_operations_of_attention_and_sinks_add_theirs():
    of_attention = lambda T, **flags: small_gpt(**flags).flops_per_token(T) - small_gpt(**flags).flops_per_token(0)
    per_key = 12 * 2 * 4 * 4  # layers, heads, head size
    assert of_attention(10, window=4) == 4 * per_key and of_attention(3, window=4) == 3 * per_key
    assert of_attention(10, window=4, n_sink=2) == 6 * per_key and of_attention(16, n_sink=5) == 16 * per_key


# Optimizers

@pytest.mark.parametrize('flags', [GPT2, dict(n_expert=2, tie_weights=False), dict(qk_norm=True, bias=True)])
@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_every_parameter_has_one_group_and_only_matrices_decay(kind, flags):
    model = small_gpt(**flags)
    names = {p: name for name, p in model.named_parameters()}
    optimizers = model.optimizers(kind, 3e-3, 0.1, (0.9, 0.95), muon_lr=0.02)
    assert [type(o) for o in optimizers] == [torch.optim.AdamW, Muon][:1 + (kind == 'muon')]
    groups = [(o, group) for o in optimizers for group in o.param_groups]
    assert sorted(names[p] for _, g in groups for p in g['params']) == sorted(names.values())
    for optimizer, group in groups:
        for p in group['params']:
            assert group['weight_decay'] == (0.1 if p.dim() > 1 else 0), names[p]
            by_muon = kind == 'muon' and names[p].endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
            assert isinstance(optimizer, Muon) == by_muon, names[p]
        assert math.isclose(group['lr_scale'] * 3e-3, 0.02 if isinstance(optimizer, Muon) else 3e-3)
    with pytest.raises(ValueError, match="optimizer must be 'adamw' or 'muon'; got 'sgd'"):
        model.optimizers('sgd', 3e-3, 0.1, (0.9, 0.95))


def test_muon_takes_pytorchs_steps(monkeypatch):
    """In the same precision: PyTorch's rounds to bfloat16, which is switched off here for both."""
    monkeypatch.setattr(torch.Tensor, 'bfloat16', torch.Tensor.float)
    torch.manual_seed(0)
    shapes = [(8, 24), (24, 8), (8, 24), (5, 5), (40, 7)]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in ws] for ws in [[torch.randn(s) for s in shapes]] * 2)
    mine = Muon(ours, lr=0.05, momentum=0.9, weight_decay=0.2)
    reference = torch.optim.Muon(theirs, lr=0.05, momentum=0.9, weight_decay=0.2)
    for step in range(5):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape) * 10.0 ** (step - 2)
            b.grad = a.grad.clone()
        before = [a.detach().clone() for a in ours]
        mine.step()
        reference.step()
        assert all(close(a, b, 1e-5) for a, b in zip(ours, theirs))
        assert all(largest_gap(a, b) > 1e-3 for a, b in zip(ours, before))


@pytest.mark.parametrize('shape', [(16, 16), (12, 40), (40, 12)])
def test_muons_update_keeps_the_singular_vectors_and_brings_the_values_near_1(shape):
    torch.manual_seed(0)
    g = torch.randn(3, *shape)
    U, S, Vh = torch.linalg.svd(g, full_matrices=False)
    inside = U.mT @ orthogonalize(g).float() @ Vh.mT  # its coordinates in the singular vectors of g
    values = inside.diagonal(dim1=1, dim2=2)
    assert ((values > 0.5) & (values < 1.3))[S > 0.05 * S.amax(1, keepdim=True)].all()
    assert (inside - torch.diag_embed(values)).abs().max() < 0.05


# Sampling

def by_enumeration(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution, from definitions: of all sets of k tokens the likeliest; then of all sets that reach
    the share p of what is left the smallest, and of these the likeliest."""
    p = np.exp(np.array(logits, dtype=float) / temperature)
    keep = range(len(p))
    if top_k:
        keep = max(itertools.combinations(keep, min(top_k, len(p))), key=lambda s: p[list(s)].sum())
    if top_p < 1:
        reach = [s for n in range(1, len(p) + 1) for s in itertools.combinations(keep, n)
                 if p[list(s)].sum() >= top_p * p[list(keep)].sum()]
        keep = max(reach, key=lambda s: (-len(s), p[list(s)].sum()))
    kept = np.isin(np.arange(len(p)), keep) * p
    return kept / kept.sum()


SAMPLING = [dict(), dict(temperature=0.5), dict(temperature=3.0), dict(top_k=1), dict(top_k=2), dict(top_k=4),
            dict(top_k=99), dict(top_p=0.01), dict(top_p=0.5), dict(top_p=0.9), dict(top_p=0.999), dict(top_k=4, top_p=0.7),
            dict(temperature=2.0, top_k=5, top_p=0.6)]


@pytest.mark.parametrize('how', SAMPLING, ids=str)
def test_each_way_of_sampling_has_its_exact_distribution(how):
    logits = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)) * 2
    expected = np.array([by_enumeration(row, **how) for row in logits.tolist()])
    assert close(sampling_probs(logits, **how), expected, 1e-6)


def test_the_token_that_crosses_p_is_kept():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert close(sampling_probs(logits, top_p=0.49)[0], [1, 0, 0], 1e-6)
    assert close(sampling_probs(logits, top_p=0.51)[0], [0.5 / 0.8, 0.3 / 0.8, 0], 1e-6)
    assert close(sampling_probs(logits, top_p=0.81)[0], [0.5, 0.3, 0.2], 1e-6)


def test_of_equal_tokens_top_p_keeps_as_few_as_reach_p_and_top_k_all():
    equal = torch.zeros(1, 4)
    for p, n_kept in ((0.2, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.7, 3), (0.76, 4)):
        assert (sampling_probs(equal, top_p=p) > 0).sum() == n_kept
    assert close(sampling_probs(equal, top_k=2)[0], [0.25] * 4, 1e-6)
    assert close(sampling_probs(torch.tensor([[1., 0., 0., -1.]]), top_k=1)[0], [1, 0, 0, 0], 1e-6)


@pytest.mark.parametrize('how', SAMPLING, ids=str)
def test_sampled_sequences_are_as_frequent_as_their_probability(how):
    """All sequences of two tokens from a vocabulary of 6: chi-square of 10,000 draws."""
    model, prompt, n = small_gpt(vocab_size=6, n_embd=8, n_layer=1), torch.tensor([[3, 1, 4]]), 10_000
    expected = np.zeros((6, 6))
    first = by_enumeration(model(prompt)[0][0, -1].tolist(), **how)
    for token in range(6):
        longer = torch.cat((prompt, torch.tensor([[token]])), dim=1)
        expected[token] = first[token] * by_enumeration(model(longer)[0][0, -1].tolist(), **how)
    drawn = model.generate(prompt.expand(n, 3), 2, **how, generator=torch.Generator().manual_seed(0))[:, 3:].numpy()
    counts = np.zeros((6, 6))
    np.add.at(counts, (drawn[:, 0], drawn[:, 1]), 1)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - n * expected) ** 2)[possible] / (n * expected[possible])
    freedom = possible.sum() - 1
    assert chi_square.sum() <= freedom + 5 * math.sqrt(2 * freedom)


# Generation

def naive_greedy(model, ids, n, stop=()):
    """One row, no cache: the whole text again for each token, the last block of it for learned positions."""
    ids = list(ids)
    for _ in range(n):
        seen = ids[-model.config.block_size:] if model.config.pos == 'learned' else ids
        with torch.no_grad():
            ids.append(model(torch.tensor([seen]))[0][0, -1].argmax().item())
        if ids[-1] in stop:
            break
    return ids


STREAMS = [dict(), dict(GPT2), dict(pos='sinusoidal'), dict(n_sink=2), dict(window=3),
           dict(window=3, n_sink=1, n_kv_head=2), dict(n_expert=3), dict(qk_norm=True, norm='layernorm')]


@pytest.mark.parametrize('flags', STREAMS, ids=str)
@pytest.mark.parametrize('T', [1, 6, 25])
def test_greedy_generation_takes_the_likeliest_token_with_a_cache_or_without(flags, T):
    """From prompts shorter and longer than block_size (8), and on past it."""
    model, idx = small_gpt(block_size=8, tie_weights=False, **flags), some_ids(2, T)
    expected = torch.tensor([naive_greedy(model, row, 14) for row in idx.tolist()])
    for use_cache in (True, False):
        assert torch.equal(model.generate(idx, 14, temperature=0, use_cache=use_cache), expected)


@pytest.mark.parametrize('use_cache', [True, False])
@pytest.mark.parametrize('flags', STREAMS, ids=str)
def test_rows_of_different_lengths_come_out_as_each_alone_and_end_at_stop_tokens(flags, use_cache):
    model, stop, ends = small_gpt(block_size=8, tie_weights=False, **flags), (4, 6), []
    for case, lengths in enumerate([(1, 1, 5, 12), (4, 1, 5, 12), (7, 3, 2, 9), (5, 5, 5, 5)]):
        rows = [some_ids(n, seed=10 * case + i).tolist() for i, n in enumerate(lengths)]
        padded = torch.tensor([[-1] * (max(lengths) - len(row)) + row for row in rows])
        out = model.generate(padded, 12, temperature=0, stop=stop, use_cache=use_cache)
        alone = [naive_greedy(model, row, 12, stop)[len(row):] for row in rows]
        assert out.shape[1] == max(lengths) + max(map(len, alone))  # nothing is done once all rows have ended
        for made, expected in zip(out[:, max(lengths):].tolist(), alone):
            assert made == expected + [-1] * (len(made) - len(expected))
        ends += [len(a) for a in alone]
    assert len(set(ends)) > 2


def test_while_decoding_only_the_last_logits_are_computed():
    model, shapes = small_gpt(), []
    model.lm_head.register_forward_hook(lambda _, args, output: shapes.append(tuple(output.shape)))
    model.generate(some_ids(3, 9), 4)
    assert shapes == [(3, 11)] * 4


def test_the_same_generator_state_gives_the_same_tokens():
    model, idx = small_gpt(), some_ids(2, 3)
    draw = lambda seed, **how: model.generate(idx, 30, generator=torch.Generator().manual_seed(seed), **how)
    assert torch.equal(draw(5), draw(5)) and not torch.equal(draw(5), draw(6))
    assert torch.equal(draw(5), draw(5, use_cache=False))
    global_state = torch.get_rng_state()
    draw(7)
    assert torch.equal(torch.get_rng_state(), global_state)


@pytest.mark.parametrize('training', [True, False])
def test_generation_leaves_the_model_in_the_mode_it_was_found_in(training):
    model, idx = small_gpt(dropout=0.5).train(training), some_ids(1, 3)
    out = model.generate(idx, 5, temperature=0)
    assert model.training is training
    assert torch.equal(out, small_gpt().generate(idx, 5, temperature=0))  # no dropout meanwhile
    for _ in model.stream(idx, 5):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        break  # a stream that is abandoned
    assert model.training is training
    with pytest.raises(IndexError):
        model.generate(torch.tensor([[99]]), 5)  # no such token
    assert model.training is training and torch.is_grad_enabled()


def test_generation_refuses_what_it_cannot_do():
    model = small_gpt()
    for idx in (torch.empty(1, 0, dtype=torch.long), torch.tensor([[1, 2], [-1, -1]]), torch.tensor([[1, 2], [1, -1]])):
        with pytest.raises(ValueError, match='token at the end of every row'):
            model.generate(idx, 3)
    for how in (dict(temperature=-1.0), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.5)):
        with pytest.raises(ValueError, match=f'{next(iter(how))} {next(iter(how.values()))}'):
            model.generate(some_ids(1, 3), 3, **how)
    with pytest.raises(ValueError, match='causal False'):
        small_gpt(causal=False).generate(some_ids(1, 3), 3)
    with pytest.raises(ValueError, match="17 tokens do not fit in block_size 16, which pos 'learned'"):
        small_gpt(pos='learned')(some_ids(1, 17))


# Heads and padding

PADDINGS = [(0, 0), (3, 0), (0, 4), (2, 2)]


def with_padding(ids, left, right):
    """The ids and their positions, with tokens of padding on both sides."""
    n = len(ids)
    return torch.tensor([[-1] * left + ids + [-1] * right]), torch.tensor([[-1] * left + [*range(n)] + [-1] * right])


@pytest.mark.parametrize('attn', ['manual', 'sdpa'])
@pytest.mark.parametrize('flags', [dict(), dict(GPT2), dict(pos='sinusoidal'), dict(window=2, n_sink=1), dict(causal=False),
                                   dict(causal=False, **GPT2), dict(causal=False, n_expert=3)], ids=str)
def test_padding_changes_no_hidden_state_and_no_score(flags, attn):
    model = small_gpt(attn=attn, **flags)
    head = ScalarHead(16, std=1.0)
    ids = some_ids(7).tolist()
    alone = model.hidden(torch.tensor([ids]))
    read = alone[0, -1] if model.config.causal else alone[0].mean(0)
    expected = (read @ head.proj.weight[0] + head.proj.bias[0]).item()
    for left, right in PADDINGS:
        idx, pos = with_padding(ids, left, right)
        h = model.hidden(idx, pos=pos)
        assert h.isfinite().all() and close(h[0, left:left + 7], alone[0])
        read = pos == 6 if model.config.causal else pos >= 0
        assert abs(head.score(h[read], read).item() - expected) < 1e-3


@pytest.mark.parametrize('flags', [dict(), dict(GPT2), dict(causal=False), dict(n_expert=3), dict(window=4, n_sink=1)], ids=str)
def test_tokens_that_are_read_alone_have_the_hidden_states_and_gradients_they_have_among_all(flags):
    model = small_gpt(n_layer=2, **flags)
    pos = torch.tensor([[-1, -1, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, -1, -1]])
    idx, read = torch.where(pos < 0, -1, some_ids(2, 8)), (pos == 1) | (pos >= 4)
    for where in (read.nonzero(as_tuple=True), read, (slice(None), 5)):
        few, among = model.hidden(idx, pos=pos, read=where), model.hidden(idx, pos=pos)[where]
        assert few.shape == among.shape and close(few, among)
        few, among = (torch.autograd.grad(h.square().sum(), [*model.parameters()], allow_unused=True) for h in (few, among))
        assert all(close(a, b, 1e-4) for a, b in zip(few, among) if b is not None)
    assert close(model(idx.clamp(min=0), read=where)[0], model(idx.clamp(min=0))[0][:, 5])


def test_a_scalar_head_reads_each_token_and_starts_at_zero():
    h, head = torch.randn(2, 5, 16), ScalarHead(16, std=0.5)
    assert close(head(h), torch.einsum('btc,c->bt', h, head.proj.weight[0]), 1e-5)
    assert (ScalarHead(16)(h) == 0).all()
    torch.manual_seed(0)
    assert abs(ScalarHead(4000, std=0.5).proj.weight.std() / 0.5 - 1) < 0.05


# Settings

IMPOSSIBLE = [(dict(n_embd=18), 'n_embd 18', 'n_head 4'), (dict(n_kv_head=3), 'n_head 4', 'n_kv_head 3'),
              (dict(n_embd=12), "pos 'rope'", 'head_dim 3'), (dict(head_dim=5), "pos 'rope'", 'head_dim 5'),
              (dict(pos='sinusoidal', n_embd=9, n_head=1), "pos 'sinusoidal'", 'n_embd 9'),
              (dict(window=17), 'window 17', 'block_size 16'), (dict(window=10, n_sink=7), 'n_sink 7', 'block_size 16'),
              (dict(n_sink=16), 'n_sink 16', 'block_size 16'), (dict(causal=False, window=4), 'causal False', 'window 4'),
              (dict(causal=False, n_sink=4), 'causal False', 'n_sink 4'),
              (dict(n_expert=2, n_expert_active=3), 'n_expert_active 3', 'n_expert 2'),
              (dict(n_expert=2, n_expert_active=0), 'n_expert_active 0', 'n_expert 2'),
              (dict(n_expert=2, moe_every=3), 'moe_every 3', 'n_layer 2'),
              (dict(n_shared_expert=1), 'n_shared_expert 1', 'n_expert 0'),
              (dict(n_expert=2, n_shared_expert=-1), 'n_shared_expert -1', 'n_expert 2'),
              *((dict([(name, 'best')]), name, "got 'best'") for name in ('norm', 'pos', 'mlp', 'attn', 'moe_balance')),
              *((dict([(name, 0)]), name, 'got 0') for name in
                ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'moe_every')),
              *((dict([(name, -1)]), name, 'got -1') for name in
                ('n_kv_head', 'head_dim', 'n_hidden', 'window', 'n_sink', 'n_expert'))]


@pytest.mark.parametrize('flags, one, other', IMPOSSIBLE, ids=[str(case[0]) for case in IMPOSSIBLE])
def test_an_impossible_combination_is_refused_by_the_names_of_both_settings(flags, one, other):
    with pytest.raises(ValueError) as error:
        GPTConfig(**SMALL | flags)
    assert one in str(error.value) and other in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('flags', [dict(), dict(mlp='relu2', n_kv_head=2, head_dim=6), dict(n_expert=3, window=4)])
def test_a_config_written_to_a_checkpoint_is_read_back_as_it_was(flags):
    config = GPTConfig(**SMALL | flags)
    assert GPTConfig(**asdict(config)) == config and 0 not in (config.n_kv_head, config.head_dim, config.n_hidden)


def all_flags():
    """Every combination of the flags that makes sense; what they do not change (attn, bias, ...) goes round."""
    rest = itertools.cycle([dict(attn='manual'), dict(attn='sdpa', bias=True), dict(attn='auto', qkv_bias=True),
                            dict(attn='manual', bias=True, tie_weights=False), dict(attn='sdpa', head_dim=6)])
    for norm, pos, mlp, n_kv_head, qk_norm, n_expert, (window, n_sink, causal) in itertools.product(
            ('layernorm', 'rmsnorm'), ('learned', 'sinusoidal', 'rope'), ('gelu', 'swiglu', 'relu2'), (4, 2), (False, True),
            (0, 3), ((0, 0, True), (3, 0, True), (0, 2, True), (3, 2, True), (0, 0, False))):
        yield dict(norm=norm, pos=pos, mlp=mlp, n_kv_head=n_kv_head, qk_norm=qk_norm, n_expert=n_expert, window=window,
                   n_sink=n_sink, causal=causal, **next(rest))


def test_every_combination_of_flags_learns_and_speaks():
    """One step of training lowers the loss and reaches every parameter, with a balancing loss for experts; then
    three tokens, past the end of the block."""
    idx, targets = some_ids(2, 8), some_ids(2, 8, seed=1)
    count = 0
    for count, flags in enumerate(all_flags(), 1):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**SMALL | dict(block_size=8) | flags))
        [optimizer] = model.optimizers('adamw', 1e-3, 0.1, (0.9, 0.95))
        loss = model(idx, targets)[1]
        (loss + 0.01 * model.aux_loss()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), flags
        optimizer.step()
        with torch.no_grad():
            assert model(idx, targets)[1] < loss and loss.isfinite(), flags
        if model.config.causal:
            out = model.generate(idx[:, :7], 3, generator=torch.Generator().manual_seed(0))
            assert out.shape == (2, 10) and ((0 <= out) & (out < 11)).all(), flags
    assert count == 720
