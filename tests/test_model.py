"""
The contract of model.py, and of fast_decoding in sample.py. Each part is compared with something
independent of it: a closed form, a published formula, plain loops, a small GPT written in numpy
(numpy_gpt, below), or PyTorch's own optimizer and counter of operations.
"""
import doctest
import itertools
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import model as model_module
import sample
from configurator import has_fast_bfloat16
from data.pretrained import resize_vocab
from model import (
    GPT,
    GPTConfig,
    MoE,
    Muon,
    RewardModel,
    ScalarHead,
    attention,
    evaluation_mode,
    local_attention,
    orthogonalize,
    rope_frequencies,
    rope_table,
    rotate,
    sampling_probs,
    separate_sinks,
    sinusoidal,
    visible,
)
from sample import fast_decoding, fast_linear

# QK norm, which is on by default, is off here: a test that is about it turns it on.
SMALL = dict(block_size=16, vocab_size=11, n_layer=2, n_head=4, n_embd=16, qk_norm=False)
GPT2 = dict(norm='layernorm', pos='learned', mlp='gelu', bias=True, qk_norm=False)
ATTN = ('manual', 'sdpa', 'auto')


def small_gpt(seed=0, **flags):
    """
    A small model in eval mode. Its weights are larger than initial ones, so that queries prefer
    some keys and a router prefers some experts.
    """
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SMALL | flags))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape) / math.sqrt(p.size(1)))
            else:
                p.add_(0.2 * torch.randn(p.shape))
    return model.eval()


def some_ids(*shape, seed=0, vocab_size=SMALL['vocab_size']):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, shape, generator=generator)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def close(a, b, tolerance=1e-4):
    """Whether two tensors or arrays have the same shape and nearly equal values; False for NaN."""
    a = torch.as_tensor(a).detach().double()
    b = torch.as_tensor(b).detach().double()
    return a.shape == b.shape and bool((a - b).abs().max() < tolerance)


def largest_gap(a, b):
    return (a - b).abs().max().item()


def gradients(y, *inputs):
    """The gradients of a fixed random weighting of y."""
    torch.manual_seed(1)
    return torch.autograd.grad((y * torch.randn(y.shape)).sum(), inputs)


# -----------------------------------------------------------------------------
# A GPT in numpy and plain loops, for one sequence at a time

def array(tensor):
    return tensor.detach().double().numpy()


def numpy_linear(layer, x):
    y = x @ array(layer.weight).T
    if layer.bias is not None:
        y = y + array(layer.bias)
    return y


def numpy_softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def numpy_norm(layer, x, kind, eps):
    if kind == 'layernorm':
        x = x - x.mean(-1, keepdims=True)
    root = np.sqrt((x ** 2).mean(-1, keepdims=True) + eps)
    y = x / root * array(layer.weight)
    if getattr(layer, 'bias', None) is not None:
        y = y + array(layer.bias)
    return y


def is_visible(q_pos, k_pos, config):
    """Whether the query at q_pos sees the key at k_pos."""
    if not config.causal:
        return True
    window = config.window or config.block_size - config.n_sink
    in_window = q_pos - k_pos < window
    is_sink = k_pos < config.n_sink
    return k_pos <= q_pos and (in_window or is_sink)


def as_complex(x):
    """RoPE's pairs of channels as complex numbers: channel i is the real part, i + hs/2 the
    imaginary part."""
    half = x.shape[-1] // 2
    return x[..., :half] + 1j * x[..., half:]


def attention_score(query, key, q_pos, k_pos, config):
    """
    The product of a query and a key. RoPE multiplies complex numbers by exp(i * distance *
    frequency). Past block_size the sinks are seen from the last position of the block.
    """
    if config.pos != 'rope':
        return query @ key
    if k_pos < config.n_sink:
        q_pos = min(q_pos, config.block_size - 1)
    pair = np.arange(0, config.head_size, 2)
    angle = (q_pos - k_pos) / config.rope_base ** (pair / config.head_size)
    product = as_complex(query) * as_complex(key).conj() * np.exp(1j * angle)
    return product.sum().real


def numpy_attention(layer, x, config):
    c = config
    T = len(x)
    hs = c.head_size
    n_q = c.n_head * hs
    n_k = c.kv_heads * hs
    q, k, v = np.split(numpy_linear(layer.c_attn, x), [n_q, n_q + n_k], axis=1)
    out = np.zeros_like(q)
    for head in range(c.n_head):
        kv_head = head // (c.n_head // c.kv_heads)
        q_channels = slice(head * hs, (head + 1) * hs)
        kv_channels = slice(kv_head * hs, (kv_head + 1) * hs)
        queries = q[:, q_channels]
        keys = k[:, kv_channels]
        values = v[:, kv_channels]
        if c.qk_norm:
            queries = numpy_norm(layer.q_norm, queries, 'rmsnorm', c.norm_eps)
            keys = numpy_norm(layer.k_norm, keys, 'rmsnorm', c.norm_eps)
        for t in range(T):
            seen = [s for s in range(T) if is_visible(t, s, c)]
            scores = [attention_score(queries[t], keys[s], t, s, c) for s in seen]
            weights = numpy_softmax(np.array(scores) / math.sqrt(hs))
            out[t, q_channels] = weights @ values[seen]
    return numpy_linear(layer.c_proj, out)


def numpy_mlp(layer, x, config):
    h = numpy_linear(layer.c_fc, x)
    if config.mlp == 'swiglu':
        gate, up = np.split(h, 2, axis=-1)
        h = gate / (1 + np.exp(-gate)) * up
    elif config.mlp == 'relu2':
        h = np.maximum(h, 0) ** 2
    else:
        # The approximation by tanh; it differs from the exact GELU by at most 0.0005.
        h = h / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))
    return numpy_linear(layer.c_proj, h)


def numpy_moe(layer, x, config):
    out = np.zeros_like(x)
    for t, logits in enumerate(numpy_linear(layer.router, x)):
        selected = np.argsort(-logits)[:config.n_expert_active]
        gates = numpy_softmax(logits[selected])
        for gate, e in zip(gates, selected):
            out[t] += gate * numpy_mlp(layer.experts[e], x[t], config)
    return out


def numpy_block(block, x, config):
    c = config
    x = x + numpy_attention(block.attn, numpy_norm(block.ln_1, x, c.norm, c.norm_eps), c)
    normed = numpy_norm(block.ln_2, x, c.norm, c.norm_eps)
    if isinstance(block.mlp, MoE):
        return x + numpy_moe(block.mlp, normed, c)
    return x + numpy_mlp(block.mlp, normed, c)


def numpy_gpt(model, ids):
    """The logits (T, V) of a list of ids."""
    c = model.config
    T = len(ids)
    x = array(model.wte.weight)[ids]
    if c.pos == 'learned':
        x = x + array(model.wpe.weight)[:T]
    if c.pos == 'sinusoidal':
        x = x * math.sqrt(c.n_embd)
        for t, i in itertools.product(range(T), range(c.n_embd)):
            angle = t / 10000 ** (i // 2 * 2 / c.n_embd)
            x[t, i] += math.sin(angle) if i % 2 == 0 else math.cos(angle)
    for block in model.h:
        x = numpy_block(block, x, c)
    return numpy_linear(model.lm_head, numpy_norm(model.ln_f, x, c.norm, c.norm_eps))


def run_part(model, part, x):
    """The output of a part of the model (a block, or its attention) for the input x (B, T, C)."""
    outputs = []

    def replace_input(_, args):
        return x, *args[1:]

    def keep_output(_, args, output):
        outputs.append(output)

    hooks = [part.register_forward_pre_hook(replace_input),
             part.register_forward_hook(keep_output)]
    model(torch.zeros(x.shape[:2], dtype=torch.long))
    for hook in hooks:
        hook.remove()
    return outputs[0]


def test_the_examples_in_the_docstrings_print_what_they_show():
    results = doctest.testmod(model_module)
    assert results.attempted > 15 and results.failed == 0


# -----------------------------------------------------------------------------
# Positions

def test_sinusoidal_positions_follow_the_formula_of_the_paper():
    C = 12
    table = sinusoidal(torch.arange(100), C)
    for p, i in itertools.product(range(100), range(C // 2)):
        angle = p / 10000 ** (2 * i / C)
        assert abs(table[p, 2 * i] - math.sin(angle)) < 1e-5
        assert abs(table[p, 2 * i + 1] - math.cos(angle)) < 1e-5


def one_head(head_size, **flags):
    """The config of a single head of this size."""
    return GPTConfig(n_head=1, n_embd=head_size, **flags)


def test_rope_multiplies_pairs_of_channels_as_complex_numbers():
    x = torch.randn(2, 3, 5, 8)
    pos = torch.tensor([0, 1, 7, 100, 5000])
    table = rope_table(pos[None], rope_frequencies(one_head(8, rope_base=500.0)))
    rotated = rotate(x, table)
    angle = pos.numpy()[:, None] / 500.0 ** (np.arange(4) * 2 / 8)
    expected = as_complex(array(x)) * np.exp(1j * angle)
    assert np.abs(as_complex(array(rotated)) - expected).max() < 1e-5
    # A rotation keeps the length, and at position 0 it changes nothing.
    assert close(rotated.norm(dim=-1), x.norm(dim=-1), 1e-5)
    assert close(rotated[:, :, 0], x[:, :, 0], 1e-7)
    assert rotate(x.bfloat16(), table).dtype == torch.float32


def test_a_rope_score_depends_only_on_the_distance():
    q, k = torch.randn(2, 1, 1, 1, 32).unbind()
    frequencies = rope_frequencies(one_head(32))

    def score_at(q_pos, k_pos):
        rotated_q = rotate(q, rope_table(torch.tensor([[q_pos]]), frequencies))
        rotated_k = rotate(k, rope_table(torch.tensor([[k_pos]]), frequencies))
        return (rotated_q * rotated_k).sum()

    for distance in (0, 1, 9, 200):
        scores = [score_at(start + distance, start) for start in (0, 1, 50, 3000)]
        scores = torch.stack(scores)
        assert close(scores, scores[:1].expand(4), 1e-4)
    assert largest_gap(score_at(9, 0), score_at(10, 0)) > 1e-2


def test_linear_rope_scaling_divides_every_frequency_by_the_factor():
    plain = rope_frequencies(one_head(16))
    scaled = rope_frequencies(one_head(16, rope_scaling='linear', rope_factor=3.0))
    assert close(plain, 10000.0 ** (-np.arange(8) * 2 / 16), 1e-12)
    assert close(scaled * 3, plain, 1e-12)


def test_llama3_rope_scaling_follows_the_published_rule():
    """A pair with a short wavelength is unchanged, one with a long wavelength is divided by the
    factor, and those between them are interpolated."""
    context = 8192
    flags = dict(rope_factor=8.0, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0)
    config = one_head(64, rope_base=500000.0, rope_scaling='llama3',
                      rope_original_context=context, **flags)
    expected = []
    for i in range(32):
        frequency = 500000.0 ** (-2 * i / 64)
        wavelength = 2 * math.pi / frequency
        if wavelength < context / 4:
            expected.append(frequency)
        elif wavelength > context / 1:
            expected.append(frequency / 8)
        else:
            smooth = (context / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    frequencies = rope_frequencies(config)
    assert np.allclose(frequencies.numpy(), expected, rtol=1e-12, atol=0)
    ratio = frequencies / rope_frequencies(one_head(64, rope_base=500000.0))
    is_between = (ratio > 0.126) & (ratio < 0.999)
    assert ratio[0] == 1 and abs(ratio[-1] - 1 / 8) < 1e-12 and is_between.any()


# -----------------------------------------------------------------------------
# Attention

@pytest.mark.parametrize('attn', ATTN)
def test_attention_of_three_tokens_equals_a_calculation_by_hand(attn):
    """One head of size 2 and three tokens; follow it with pencil and paper."""
    model = GPT(GPTConfig(block_size=3, vocab_size=3, n_layer=1, n_head=1, n_embd=2,
                          pos='learned', qk_norm=False, attn=attn))
    layer = model.h[0].attn
    x = torch.tensor([[1., 0.], [0., 1.], [1., 1.]])   # the three tokens
    with torch.no_grad():
        layer.c_attn.weight.copy_(torch.tensor([
            [2., 0.], [0., 1.],      # queries: the first channel doubled
            [0., 1.], [1., 0.],      # keys: the channels exchanged
            [10., 0.], [0., 20.],    # values: 10 times the first channel, 20 times the second
        ]))
        layer.c_proj.weight.copy_(torch.tensor([
            [1., 1.],                # output: the sum of both channels
            [1., -1.],               # and their difference
        ]))
    # queries      keys         values
    # 1: (2, 0)    1: (0, 1)    1: (10,  0)
    # 2: (0, 1)    2: (1, 0)    2: ( 0, 20)
    # 3: (2, 1)    3: (1, 1)    3: (10, 20)
    #
    # scores, query . key; a token does not see those after it:
    #   1: 2*0 + 0*1 = 0
    #   2: 0*0 + 1*1 = 1    0*1 + 1*0 = 0
    #   3: 2*0 + 1*1 = 1    2*1 + 1*0 = 2    2*1 + 1*1 = 3
    # divided by the square root of the head size, 1.41421:
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
    # the weighted sums of the values:
    #   1: 1 * (10, 0)                                                      = (10,      0)
    #   2: 0.66976 * (10, 0) + 0.33024 * (0, 20)                            = ( 6.6976, 6.6048)
    #   3: 0.14003 * (10, 0) + 0.28400 * (0, 20) + 0.57598 * (10, 20)       = ( 7.1601, 17.1996)
    # the sum of both channels and their difference:
    expected = torch.tensor([[10., 10.], [13.3024, 0.0928], [24.3597, -10.0395]])
    assert close(run_part(model, layer, x[None])[0], expected, 1e-3)


HEADS = {
    'one head': dict(n_head=1),
    'many heads': dict(n_head=4),
    'grouped queries': dict(n_head=4, n_kv_head=2),
    'one key head': dict(n_head=4, n_kv_head=1),
    'head size set': dict(n_head=3, head_dim=6),
    'QK norm': dict(qk_norm=True, n_kv_head=2),
    'biases': dict(bias=True),
    'qkv biases': dict(qkv_bias=True),
    'window': dict(window=3),
    'window and sinks': dict(window=3, n_sink=2, n_kv_head=2),
    'encoder': dict(causal=False),
}


@pytest.mark.parametrize('pos', ['learned', 'rope'])
@pytest.mark.parametrize('flags', HEADS.values(), ids=HEADS)
def test_attention_and_block_equal_numpy(flags, pos):
    for attn in ATTN:
        model = small_gpt(pos=pos, attn=attn, **flags)
        block = model.h[1]
        x = torch.randn(2, 9, 16)
        attended = run_part(model, block.attn, x)
        out = run_part(model, block, x)
        for row in range(2):
            x_row = array(x[row])
            assert close(attended[row], numpy_attention(block.attn, x_row, model.config))
            assert close(out[row], numpy_block(block, x_row, model.config))


KINDS = list(itertools.product(
    ('layernorm', 'rmsnorm'),
    ('learned', 'sinusoidal', 'rope'),
    ('gelu', 'swiglu', 'relu2'),
))


@pytest.mark.parametrize('n_expert', [0, 3])
@pytest.mark.parametrize('norm, pos, mlp', KINDS)
def test_the_whole_model_equals_numpy(norm, pos, mlp, n_expert):
    model = small_gpt(norm=norm, pos=pos, mlp=mlp, n_expert=n_expert, n_kv_head=2,
                      bias=n_expert == 0, moe_every=2)
    ids = some_ids(16).tolist()
    logits = model(torch.tensor([ids]))[0][0]
    assert close(logits, numpy_gpt(model, ids), 1e-3)


def test_the_default_architecture_equals_numpy():
    defaults = asdict(GPTConfig())
    sizes = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd')
    architecture = {name: value for name, value in defaults.items() if name not in sizes}
    model = small_gpt(**architecture)
    assert model.config.qk_norm and model.config.mlp == 'swiglu' and model.config.pos == 'rope'
    ids = some_ids(16).tolist()
    assert close(model(torch.tensor([ids]))[0][0], numpy_gpt(model, ids), 1e-3)


def window_mask(T, window, n_sink):
    """True where the query sees the key: the past within the window, and the sinks."""
    rows = []
    for q in range(T):
        rows.append([k <= q and (q - k < window or k < n_sink) for k in range(T)])
    return torch.tensor(rows)


def test_visible_is_the_past_within_the_window_and_the_sinks():
    for T, window, n_sink in itertools.product((1, 2, 7, 12), (1, 3, 12), (0, 1, 4)):
        pos = torch.arange(T)
        mask = visible(pos, pos, window, n_sink)
        assert torch.equal(mask, window_mask(T, window, n_sink)), (T, window, n_sink)


@pytest.mark.parametrize('causal, expected', [
    (True, [[False, False, True, False], [False, False, True, True]]),
    (False, [[False, False, True, True], [False, False, True, True]]),
])
def test_padding_is_visible_to_no_token(causal, expected):
    # Two rows of four tokens; the first row begins with two tokens of padding.
    pos = torch.tensor([[-1, -1, 0, 1], [0, 1, 2, 3]])
    mask = visible(pos, pos, 4, 0, causal)
    assert mask[0, 2:].tolist() == expected
    assert mask.any(-1).all()  # a softmax over no key would be NaN


@pytest.mark.parametrize('nh, nkv', [(1, 1), (4, 4), (4, 2), (4, 1)])
def test_local_attention_equals_its_plain_form(nh, nkv):
    """
    The plain form is attention() under the mask of the window. Values and gradients are equal,
    whether or not T is a multiple of the window or shorter than the sinks.
    """
    for T, window, n_sink in itertools.product((1, 4, 7, 23, 24), (1, 3, 8, 30), (0, 1, 5)):
        torch.manual_seed(T)
        q = torch.randn(2, nh, T, 6, requires_grad=True)
        k = torch.randn(2, nkv, T, 6, requires_grad=True)
        v = torch.randn(2, nkv, T, 6, requires_grad=True)
        pos = torch.arange(T)
        mask = visible(pos, pos, window, n_sink)
        assert torch.equal(mask, window_mask(T, window, n_sink))
        local = local_attention(q, k, v, window, n_sink)
        plain = attention(q, k, v, mask)
        assert close(local, plain, 1e-5), (T, window, n_sink)
        for a, b in zip(gradients(local, q, k, v), gradients(plain, q, k, v)):
            assert close(a, b, 1e-5), (T, window, n_sink)


@pytest.mark.parametrize('nh, nkv', [(1, 1), (4, 4), (4, 2)])
@pytest.mark.parametrize('n_sink', [0, 1, 3, 7])
def test_separate_sinks_equals_its_plain_form(nh, nkv, n_sink):
    """The plain form computes both products, selects by key, and divides by sqrt(hs)."""
    torch.manual_seed(0)
    T, S, hs = 5, 7, 6
    q = torch.randn(2, nh, T, hs, requires_grad=True)
    q_for_sinks = torch.randn(2, nh, T, hs, requires_grad=True)
    k = torch.randn(2, nkv, S, hs, requires_grad=True)
    v = torch.randn(2, nkv, S, hs)
    # The sinks of the two rows are in different slots.
    is_sink = torch.zeros(2, 1, S, 1, dtype=torch.bool)
    is_sink[0, 0, :n_sink] = True
    is_sink[1, 0, S - n_sink:] = True

    k_per_head = k.repeat_interleave(nh // nkv, dim=1)
    v_per_head = v.repeat_interleave(nh // nkv, dim=1)
    to_sinks = q_for_sinks @ k_per_head.mT
    to_others = q @ k_per_head.mT
    scores = torch.where(is_sink.mT, to_sinks, to_others) / math.sqrt(hs)
    plain = scores.softmax(dim=-1) @ v_per_head

    wide_q, wide_k = separate_sinks(q, q_for_sinks, k, is_sink)
    everything = torch.ones(T, S, dtype=torch.bool)
    fast = attention(wide_q, wide_k, v, everything)
    assert close(fast, plain, 1e-5)
    inputs = (q, q_for_sinks, k)
    for a, b in zip(gradients(fast, *inputs), gradients(plain, *inputs)):
        assert close(a, b, 1e-5)


def test_dropout_keeps_the_mean_of_attention():
    torch.manual_seed(0)
    n = 4000
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
    mask = window_mask(5, 5, 0)
    samples = torch.stack([attention(q, k, v, mask, dropout=0.5) for _ in range(n)])
    spread = samples.std(0)
    assert spread.mean() > 0.1
    error = (samples.mean(0) - attention(q, k, v, mask)).abs()
    assert (error < 5 * spread / math.sqrt(n)).all()


@pytest.mark.parametrize('attn', ['manual', 'sdpa'])
def test_dropout_acts_only_in_training(attn):
    model = small_gpt(dropout=0.5, attn=attn)
    idx = some_ids(1, 9)
    without_dropout = small_gpt(attn=attn)(idx)[0]
    assert close(model(idx)[0], without_dropout, 1e-6)
    model.train()
    assert largest_gap(model(idx)[0], without_dropout) > 0.1
    assert largest_gap(model(idx)[0], model(idx)[0]) > 0.1


MODELS = {
    'plain': {},
    'gpt2': GPT2,
    'grouped queries': dict(n_kv_head=1),
    'QK norm': dict(qk_norm=True),
    'encoder': dict(causal=False),
    'window': dict(window=5),
    'window and sinks': dict(window=4, n_sink=2, n_kv_head=2, bias=True),
    'sinks': dict(n_sink=3, pos='sinusoidal'),
    'experts': dict(n_expert=4),
    'short window': dict(window=1, n_sink=12),
}


@pytest.mark.parametrize('T', [9, 16, 37])
@pytest.mark.parametrize('flags', MODELS.values(), ids=MODELS)
def test_attention_by_hand_equals_fused_attention(flags, T):
    """Logits and gradients of whole models, also past block_size, where the sinks move along."""
    if flags == GPT2:
        T = min(T, 16)  # learned positions end at block_size
    results = []
    for attn in ATTN:
        model = small_gpt(**flags, attn=attn)
        logits, loss = model(some_ids(2, T), some_ids(2, T, seed=1))
        loss.backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    manual, sdpa, auto = results
    for a, b, c in zip(manual, sdpa, auto):
        assert close(a, b) and close(a, c)


AUTOCAST = {
    'plain': {},
    'gpt2': GPT2,
    'QK norm, grouped queries': dict(qk_norm=True, n_kv_head=2),
    'encoder': dict(causal=False),
    'window': dict(window=5),
    'window and sinks': dict(window=4, n_sink=2),
    'sinks past block_size': dict(n_sink=3, block_size=32),
    'experts': dict(n_expert=4),
}


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('attn', ATTN)
@pytest.mark.parametrize('flags', AUTOCAST.values(), ids=AUTOCAST)
def test_log_probabilities_under_bfloat16_autocast_are_bitwise_equal_without_gradients(
        flags, attn, padded):
    """On a CPU the kernel of attention does not depend on whether gradients are recorded."""
    T = 64
    model = small_gpt(**dict(n_embd=64, block_size=T, attn=attn) | flags)
    idx = some_ids(2, T)
    pos = None
    if padded:
        pos = torch.stack((torch.arange(T), torch.arange(T) - 3)).clamp(min=-1)

    def logprobs():
        logits = model.lm_head(model.hidden(idx, pos=pos))
        return F.log_softmax(logits.float(), dim=-1)

    with torch.autocast('cpu', torch.bfloat16):
        with_gradients = logprobs()
        with torch.no_grad():
            without_gradients = logprobs()
    assert with_gradients.requires_grad and not without_gradients.requires_grad
    assert torch.equal(with_gradients, without_gradients)


@pytest.mark.parametrize('flags', [{}, dict(window=3), dict(n_sink=3, attn='manual')], ids=str)
def test_attention_on_a_cpu_is_float32_under_autocast(flags):
    """Only the projections are rounded to bfloat16: queries, keys, values, and the result."""
    model = small_gpt(**flags)
    layer = model.h[0].attn
    x = torch.randn(2, 12, 16)

    def round_output(_, args, output):
        return output.bfloat16().float()

    with torch.autocast('cpu', torch.bfloat16):
        autocast = run_part(model, layer, x)
    layer.c_attn.register_forward_hook(round_output)
    layer.c_proj.register_forward_pre_hook(lambda _, args: (args[0].bfloat16().float(),))
    layer.c_proj.register_forward_hook(round_output)
    with torch.no_grad():
        for linear in (layer.c_attn, layer.c_proj):
            linear.weight.copy_(linear.weight.bfloat16())
    expected = run_part(model, layer, x.bfloat16().float())
    # One unit in the last place of bfloat16 is 2 ** -7 of the value, at most.
    is_rounding = (autocast.float() - expected).abs() <= 2 ** -7 * expected.abs() + 1e-5
    assert is_rounding.all() and (autocast.float() == expected).float().mean() > 0.9


@pytest.mark.parametrize('attn', ATTN)
def test_attention_of_a_float64_model_is_float64(attn):
    """Except for RoPE, whose rotations are float32."""
    model = small_gpt(pos='learned', attn=attn).double()
    ids = some_ids(16).tolist()
    assert close(model(torch.tensor([ids]))[0][0], numpy_gpt(model, ids), 1e-9)
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    attended = run_part(model, model.h[0].attn, x)[0]
    assert close(attended, numpy_attention(model.h[0].attn, array(x[0]), model.config), 1e-12)


@pytest.mark.parametrize('norm, pos, mlp', KINDS)
def test_no_logit_depends_on_later_tokens(norm, pos, mlp):
    """
    Other tokens from position 6 on leave the logits before it unchanged and change all from it on.
    An encoder changes everywhere.
    """
    idx = some_ids(1, 11)
    other = torch.cat((idx[:, :6], (idx[:, 6:] + 1) % 11), dim=1)

    def change(model):
        """The largest change of the logits at each position."""
        with torch.no_grad():
            return (model(idx)[0] - model(other)[0]).abs().amax((0, 2))

    windows = ((0, 0), (3, 0), (3, 2), (0, 2))
    cases = itertools.product((4, 2), (False, True), windows, (0, 3))
    for case, attn in zip(cases, itertools.cycle(ATTN)):
        n_kv_head, qk_norm, (window, n_sink), n_expert = case
        flags = dict(norm=norm, pos=pos, mlp=mlp, n_kv_head=n_kv_head, qk_norm=qk_norm,
                     n_expert=n_expert, attn=attn)
        changed = change(small_gpt(window=window, n_sink=n_sink, **flags))
        assert (changed[:6] < 1e-5).all(), (flags, window, n_sink, changed)
        assert (changed[6:] > 1e-3).all(), (flags, window, n_sink, changed)
        if not (window or n_sink):
            assert (change(small_gpt(causal=False, **flags)) > 1e-4).all(), flags


# -----------------------------------------------------------------------------
# Norms and feed-forward layers

def test_rmsnorm_follows_the_formula_of_the_paper():
    model = small_gpt(qk_norm=True)
    for norm in (model.ln_f, model.h[0].attn.q_norm):
        x = torch.randn(3, *norm.normalized_shape)
        for row, out in zip(x, norm(x)):
            mean_square = sum(value ** 2 for value in row.tolist()) / len(row)
            expected = row / math.sqrt(mean_square + 1e-5) * norm.weight
            assert close(out, expected, 1e-5)


def test_swiglu_follows_the_formula_of_the_paper():
    """(swish(x W) * x V) W2, where W and V are the two halves of c_fc."""
    layer = small_gpt(mlp='swiglu', n_hidden=6).h[0].mlp
    x = torch.randn(5, 16)
    W, V = layer.c_fc.weight.chunk(2)
    W2 = layer.c_proj.weight
    assert W.shape == V.shape == (6, 16) and W2.shape == (16, 6)
    gate = x @ W.T
    swish = gate / (1 + torch.exp(-gate))
    assert close(layer(x), (swish * (x @ V.T)) @ W2.T, 1e-5)


def relu2(h):
    return torch.where(h > 0, h * h, 0)


def exact_gelu(h):
    """h times the normal distribution function."""
    return h * (1 + torch.erf(h / math.sqrt(2))) / 2


def tanh_gelu(h):
    """GPT-2's approximation."""
    return h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3))) / 2


@pytest.mark.parametrize('mlp, formula', [
    ('relu2', relu2), ('gelu', exact_gelu), ('gelu_tanh', tanh_gelu)])
def test_relu2_and_both_gelus_follow_the_formulas_of_the_papers(mlp, formula):
    layer = small_gpt(mlp=mlp).h[0].mlp
    x = torch.randn(5, 16)
    h = formula(x @ layer.c_fc.weight.T)
    assert close(layer(x), h @ layer.c_proj.weight.T, 1e-5)


@pytest.mark.parametrize('n_embd', [16, 64, 120, 768, 4096])
def test_swiglu_has_as_many_parameters_as_the_mlp_it_replaces(n_embd):
    def count(mlp):
        model = GPT(GPTConfig(n_layer=1, n_embd=n_embd, mlp=mlp))
        return sum(p.numel() for p in model.h[0].mlp.parameters())

    with torch.device('meta'):
        assert count('gelu') == count('relu2') == 8 * n_embd ** 2
        # The hidden size is 8/3 C, rounded to a multiple of 8, so it is off by at most 4.
        assert abs(count('swiglu') - 8 * n_embd ** 2) <= 3 * n_embd * 4
        if n_embd == 768:
            assert count('swiglu') == 8 * 768 ** 2


# -----------------------------------------------------------------------------
# Loss and initialisation

def test_the_loss_is_the_mean_cross_entropy_and_ignores_targets_of_minus_1():
    model = small_gpt()
    idx = some_ids(3, 8)
    targets = some_ids(3, 8, seed=1)
    targets[0, :5] = -1
    targets[2] = -1
    logits, loss = model(idx, targets)
    nats = []
    for b, t in itertools.product(range(3), range(8)):
        if targets[b, t] != -1:
            probs = numpy_softmax(array(logits[b, t]))
            nats.append(-math.log(probs[targets[b, t]]))
    assert len(nats) == 11 and abs(loss.item() - sum(nats) / 11) < 1e-5


def test_without_targets_there_is_no_loss():
    model = small_gpt()
    idx = some_ids(3, 8)
    logits, loss = model(idx)
    assert loss is None
    assert close(logits, model(idx, some_ids(3, 8, seed=1))[0], 1e-6)


@pytest.mark.parametrize('pos', ['learned', 'sinusoidal', 'rope'])
def test_before_training_all_tokens_are_about_equally_probable(pos):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=261, pos=pos))
    idx = some_ids(4, 64, vocab_size=261)
    targets = some_ids(4, 64, vocab_size=261, seed=1)
    loss = model(idx, targets)[1].item()
    assert abs(loss / math.log(261) - 1) < 0.03


@pytest.mark.parametrize('flags', [
    GPT2, dict(qk_norm=True), dict(n_expert=2, bias=True), dict(tie_weights=False)], ids=str)
def test_initial_weights_are_those_of_gpt2(flags):
    """N(0, 0.02), but 0.02 / sqrt(2 n_layer) where a layer adds to the residual stream; biases 0,
    norms 1."""
    torch.manual_seed(0)
    sizes = SMALL | dict(n_layer=8, n_embd=64, vocab_size=300, block_size=64)
    model = GPT(GPTConfig(**sizes | flags))
    n_residual = 0
    for name, p in model.named_parameters():
        if p.dim() > 1:
            is_residual = name.endswith('c_proj.weight')
            n_residual += is_residual
            expected_std = 0.02 / 4 if is_residual else 0.02
            tolerance = 0.05 if p.numel() > 2000 else 0.3
            assert abs(p.std() / expected_std - 1) < tolerance, name
            assert abs(p.mean()) < expected_std / 3, name
        elif name.endswith('bias'):
            assert (p == 0).all(), name
        else:
            assert (p == 1).all(), name
    # one in each attention, and one in each MLP or expert
    assert n_residual == 8 * (1 + max(1, model.config.n_expert))


def test_a_tied_output_layer_is_the_token_embedding():
    tied = small_gpt()
    untied = small_gpt(tie_weights=False)
    assert tied.lm_head.weight is tied.wte.weight
    assert untied.lm_head.weight is not untied.wte.weight
    untied.load_state_dict(tied.state_dict())
    for model in (tied, untied):
        model(some_ids(2, 9), some_ids(2, 9, seed=1))[1].backward()
    both = untied.wte.weight.grad + untied.lm_head.weight.grad
    assert close(tied.wte.weight.grad, both, 1e-6)
    assert untied.n_params() - tied.n_params() == 11 * 16


@pytest.mark.parametrize('tie_weights', [True, False])
def test_resize_vocab_keeps_the_old_logits_and_gives_new_tokens_their_mean(tie_weights):
    model = small_gpt(tie_weights=tie_weights)
    idx = some_ids(2, 9)
    before = model(idx)[0]
    resize_vocab(model, 14)
    after = model(idx)[0]
    mean = before.mean(-1, keepdim=True)
    assert close(after[..., :11], before, 1e-5)
    assert close(after[..., 11:], mean.expand(2, 9, 3), 1e-5)
    assert model.config.vocab_size == 14
    assert (model.lm_head.weight is model.wte.weight) == tie_weights
    resize_vocab(model, 5)  # the vocabulary never shrinks
    assert model(idx)[0].shape == (2, 9, 14)


# -----------------------------------------------------------------------------
# Counts of parameters and operations

def test_gpt2_has_124_439_808_parameters():
    with torch.device('meta'):
        model = GPT(GPTConfig(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768,
                              **GPT2))
    embeddings = 50257 * 768 + 1024 * 768
    attn = 768 * 3 * 768 + 3 * 768 + 768 * 768 + 768
    mlp = 768 * 3072 + 3072 + 3072 * 768 + 768
    norms = 4 * 768
    total = embeddings + 12 * (attn + mlp + norms) + 2 * 768
    assert model.n_params() == total == 124_439_808
    # 6 per weight except those of the position table; and for attention
    # 12 * layers * heads * head size * context
    flops = 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 12 * 64 * 1024
    assert model.flops_per_token(1024) == flops == 855_166_464


def test_parameters_of_a_model_with_experts_and_grouped_queries_equal_a_count_by_hand():
    model = small_gpt(n_layer=4, n_kv_head=2, n_hidden=24, n_expert=5, n_expert_active=2,
                      moe_every=2, tie_weights=False)
    attn = 16 * (16 + 8 + 8) + 16 * 16
    expert = 3 * 16 * 24
    router = 5 * 16
    norms = 2 * 16
    dense_layer = attn + expert + norms
    sparse_layer = attn + 5 * expert + router + norms
    embeddings = 2 * 11 * 16
    assert model.n_params() == embeddings + 16 + 2 * dense_layer + 2 * sparse_layer
    # In each of the two sparse layers a token does not use three of the five experts.
    assert model.n_params() - model.n_params(active=True) == 2 * 3 * expert


@pytest.mark.parametrize('flags', [
    dict(), dict(n_kv_head=1, mlp='relu2'), dict(pos='learned', tie_weights=False),
    dict(n_expert=4, moe_every=2), dict(n_sink=3), dict(head_dim=40)], ids=str)
def test_operations_equal_the_count_of_pytorch(flags):
    """Within 2%: the formula includes the norms' weights, which are not matrix products."""
    model = small_gpt(n_embd=64, block_size=32, vocab_size=50, attn='manual', **flags)
    with FlopCounterMode(display=False) as counter:
        model(some_ids(2, 32), some_ids(2, 32))[1].backward()
    counted = counter.get_total_flops() / 64
    assert abs(model.flops_per_token(32) / counted - 1) < 0.02


@pytest.mark.parametrize('T, flags, n_visible', [
    (10, dict(window=4), 4), (3, dict(window=4), 3), (10, dict(window=4, n_sink=2), 6),
    (16, dict(n_sink=5), 16)])
def test_operations_of_attention_are_counted_for_visible_keys_only(T, flags, n_visible):
    model = small_gpt(**flags)
    of_attention = model.flops_per_token(T) - model.flops_per_token(0)
    per_key = 12 * 2 * 4 * 4  # 12 * layers * heads * head size
    assert of_attention == n_visible * per_key


# -----------------------------------------------------------------------------
# Optimizers

@pytest.mark.parametrize('flags', [
    GPT2, dict(n_expert=2, tie_weights=False), dict(qk_norm=True, bias=True)], ids=str)
@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(kind, flags):
    model = small_gpt(**flags)
    names = {p: name for name, p in model.named_parameters()}
    optimizers = model.optimizers(kind, 3e-3, 0.1, (0.9, 0.95), muon_lr=0.02)
    expected_types = [torch.optim.AdamW]
    if kind == 'muon':
        expected_types.append(Muon)
    assert [type(optimizer) for optimizer in optimizers] == expected_types

    of_muon = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')
    found = []
    for optimizer in optimizers:
        is_muon = isinstance(optimizer, Muon)
        for group in optimizer.param_groups:
            rate = 0.02 if is_muon else 3e-3
            assert group['lr'] == group['peak_lr'] == rate
            for p in group['params']:
                name = names[p]
                found.append(name)
                assert group['weight_decay'] == (0.1 if p.dim() > 1 else 0), name
                assert is_muon == (kind == 'muon' and name.endswith(of_muon)), name
    assert sorted(found) == sorted(names.values())


def test_frozen_parameters_are_in_no_group():
    model = small_gpt()
    model.wte.requires_grad_(False)
    for optimizer in model.optimizers('muon', 3e-3, 0.1, (0.9, 0.95)):
        for group in optimizer.param_groups:
            assert all(p.requires_grad for p in group['params'])


def test_the_rate_of_muon_does_not_depend_on_the_learning_rate():
    adamw, muon = small_gpt().optimizers('muon', 0.0, 0.1, (0.9, 0.95), muon_lr=0.02)
    assert [group['peak_lr'] for group in adamw.param_groups] == [0.0, 0.0]
    assert [group['peak_lr'] for group in muon.param_groups] == [0.02]


def test_an_unknown_optimizer_is_refused_with_the_alternatives():
    with pytest.raises(ValueError, match="optimizer must be 'adamw' or 'muon'; got 'sgd'"):
        small_gpt().optimizers('sgd', 3e-3, 0.1, (0.9, 0.95))


def test_muon_takes_the_steps_of_torch_optim_muon(monkeypatch):
    """PyTorch's rounds to bfloat16, which is switched off here, so that both use float32."""
    monkeypatch.setattr(torch.Tensor, 'bfloat16', torch.Tensor.float)
    torch.manual_seed(0)
    shapes = [(8, 24), (24, 8), (8, 24), (5, 5), (40, 7), (20, 8)]
    # Ours takes the last one as three matrices in one parameter.
    rows = {len(shapes) - 1: [8, 4, 8]}
    initial = [torch.randn(shape) for shape in shapes]
    ours = [torch.nn.Parameter(w.clone()) for w in initial]
    muon = Muon({p: rows.get(i, [len(p)]) for i, p in enumerate(ours)}, lr=0.05, momentum=0.9,
                weight_decay=0.2)
    theirs = [[torch.nn.Parameter(part.clone()) for part in w.split(rows.get(i, len(w)))]
              for i, w in enumerate(initial)]
    reference = torch.optim.Muon(sum(theirs, []), lr=0.05, momentum=0.9, weight_decay=0.2)
    for step in range(5):
        for i, (a, parts) in enumerate(zip(ours, theirs)):
            a.grad = torch.randn(a.shape) * 10.0 ** (step - 2)
            for part, grad in zip(parts, a.grad.split(rows.get(i, len(a)))):
                part.grad = grad.clone()
        before = [a.detach().clone() for a in ours]
        muon.step()
        reference.step()
        for a, parts, old in zip(ours, theirs, before):
            assert close(a, torch.cat(parts), 1e-5)
            assert largest_gap(a, old) > 1e-3


@pytest.mark.parametrize('mlp, rows_of_mlp', [('swiglu', [12, 12]), ('gelu', [12])])
def test_muon_takes_queries_keys_and_values_and_both_halves_of_swiglu_apart(mlp, rows_of_mlp):
    model = small_gpt(n_head=4, n_kv_head=2, mlp=mlp, n_hidden=12)
    _, muon = model.optimizers('muon', 3e-3, 0.1, (0.9, 0.95))
    attn, mlp_layer = model.h[1].attn, model.h[1].mlp
    hs = model.config.head_size
    assert muon.rows[attn.c_attn.weight] == [4 * hs, 2 * hs, 2 * hs]
    assert muon.rows[attn.c_proj.weight] == [model.config.n_embd]
    assert muon.rows[mlp_layer.c_fc.weight] == rows_of_mlp
    assert muon.rows[mlp_layer.c_proj.weight] == [model.config.n_embd]
    assert all(sum(rows) == len(p) for p, rows in muon.rows.items())


@pytest.mark.parametrize('shape', [(16, 16), (12, 40), (40, 12)])
def test_orthogonalize_keeps_the_singular_vectors_and_brings_the_values_near_1(shape):
    torch.manual_seed(0)
    g = torch.randn(3, *shape)
    U, S, Vh = torch.linalg.svd(g, full_matrices=False)
    # the result in the basis of the singular vectors of g
    result = U.mT @ orthogonalize(g).float() @ Vh.mT
    values = result.diagonal(dim1=1, dim2=2)
    is_large = S > 0.05 * S.amax(1, keepdim=True)
    assert ((values > 0.5) & (values < 1.3))[is_large].all()
    assert (result - torch.diag_embed(values)).abs().max() < 0.05


# -----------------------------------------------------------------------------
# Sampling

def most_probable(candidates, probs):
    """The set of tokens with the largest total probability."""
    return max(candidates, key=lambda tokens: probs[list(tokens)].sum())


def enumerated_distribution(logits, temperature=1.0, top_k=0, top_p=1.0):
    """
    The distribution by definition, with all sets of tokens enumerated: top_k keeps the most
    probable set of k tokens; top_p then keeps, of the smallest sets that reach the share p of the
    rest, the most probable one.
    """
    probs = np.exp(np.array(logits, dtype=float) / temperature)
    n = len(probs)
    kept = range(n)
    if top_k:
        kept = most_probable(itertools.combinations(kept, min(top_k, n)), probs)
    if top_p < 1:
        total = probs[list(kept)].sum()
        for size in range(1, n + 1):
            largest = most_probable(itertools.combinations(kept, size), probs)
            if probs[list(largest)].sum() >= top_p * total:
                kept = largest
                break
    result = np.zeros(n)
    result[list(kept)] = probs[list(kept)]
    return result / result.sum()


SAMPLING = [
    dict(),
    dict(temperature=0.5),
    dict(temperature=3.0),
    dict(top_k=1),
    dict(top_k=2),
    dict(top_k=4),
    dict(top_k=99),
    dict(top_p=0.01),
    dict(top_p=0.5),
    dict(top_p=0.9),
    dict(top_p=0.999),
    dict(top_k=4, top_p=0.7),
    dict(temperature=2.0, top_k=5, top_p=0.6),
]


@pytest.mark.parametrize('settings', SAMPLING, ids=str)
def test_sampling_probs_equals_the_distribution_by_definition(settings):
    logits = 2 * torch.randn(30, 6, generator=seeded(0))
    expected = [enumerated_distribution(row, **settings) for row in logits.tolist()]
    assert close(sampling_probs(logits, **settings), np.array(expected), 1e-6)


@pytest.mark.parametrize('top_p, expected', [
    (0.49, [1, 0, 0]), (0.51, [0.5 / 0.8, 0.3 / 0.8, 0]), (0.81, [0.5, 0.3, 0.2])])
def test_top_p_keeps_the_token_that_crosses_p(top_p, expected):
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert close(sampling_probs(logits, top_p=top_p)[0], expected, 1e-6)


@pytest.mark.parametrize('top_p, n_kept', [
    (0.2, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.7, 3), (0.76, 4)])
def test_of_equal_tokens_top_p_keeps_the_fewest_that_reach_p(top_p, n_kept):
    probs = sampling_probs(torch.zeros(1, 4), top_p=top_p)
    assert (probs > 0).sum() == n_kept


def test_of_equal_tokens_top_k_keeps_all():
    assert close(sampling_probs(torch.zeros(1, 4), top_k=2)[0], [0.25] * 4, 1e-6)
    logits = torch.tensor([[1., 0., 0., -1.]])
    assert close(sampling_probs(logits, top_k=1)[0], [1, 0, 0, 0], 1e-6)


# 1e-45 is the smallest positive float32, 5e-324 the smallest float64.
@pytest.mark.parametrize('temperature', [1e-45, 5e-324])
@pytest.mark.parametrize('settings', [dict(), dict(top_k=3), dict(top_p=0.9)], ids=str)
@pytest.mark.parametrize('scale', [1e-4, 1.0, 1e4, 1e10])
def test_the_smallest_temperatures_give_the_most_probable_token(scale, settings, temperature):
    logits = scale * torch.randn(30, 6, generator=seeded(0))
    probs = sampling_probs(logits, temperature, **settings)
    assert torch.equal(probs, F.one_hot(logits.argmax(-1), 6).float())


@pytest.mark.parametrize('temperature', [1e-45, 5e-324])
def test_generation_at_the_smallest_temperatures_is_greedy(temperature):
    model = small_gpt(tie_weights=False)
    idx = some_ids(3, 5)
    greedy = model.generate(idx, 20, temperature=0)
    sampled = model.generate(idx, 20, temperature=temperature, generator=seeded(0))
    assert torch.equal(sampled, greedy) and len(greedy.unique()) > 2


@pytest.mark.parametrize('settings', SAMPLING, ids=str)
def test_sampled_sequences_are_as_frequent_as_their_probability(settings):
    """All sequences of two tokens from a vocabulary of 6: a chi-square test of 10,000 samples."""
    model = small_gpt(vocab_size=6, n_embd=8, n_layer=1)
    prompt = torch.tensor([[3, 1, 4]])
    n = 10_000

    # 1. the probability of each sequence
    expected = np.zeros((6, 6))
    first = enumerated_distribution(model(prompt)[0][0, -1].tolist(), **settings)
    for token in range(6):
        longer = torch.cat((prompt, torch.tensor([[token]])), dim=1)
        second = enumerated_distribution(model(longer)[0][0, -1].tolist(), **settings)
        expected[token] = first[token] * second

    # 2. its frequency
    out = model.generate(prompt.expand(n, 3), 2, **settings, generator=seeded(0))
    counts = np.zeros((6, 6))
    np.add.at(counts, (out[:, 3].numpy(), out[:, 4].numpy()), 1)

    # 3. chi-square, at most five standard deviations above its mean
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - n * expected) ** 2)[possible] / (n * expected[possible])
    degrees_of_freedom = possible.sum() - 1
    limit = degrees_of_freedom + 5 * math.sqrt(2 * degrees_of_freedom)
    assert chi_square.sum() <= limit


# -----------------------------------------------------------------------------
# Generation

def greedy_reference(model, ids, n, stop=()):
    """One row without a cache: the whole text is recomputed for each token; for learned positions
    its last block."""
    ids = list(ids)
    for _ in range(n):
        seen = ids
        if model.config.pos == 'learned':
            seen = ids[-model.config.block_size:]
        with torch.no_grad():
            logits = model(torch.tensor([seen]))[0][0, -1]
        ids.append(logits.argmax().item())
        if ids[-1] in stop:
            break
    return ids


STREAMS = [
    dict(),
    dict(GPT2),
    dict(pos='sinusoidal'),
    dict(n_sink=2),
    dict(window=3),
    dict(window=3, n_sink=1, n_kv_head=2),
    dict(n_expert=3),
    dict(qk_norm=True, norm='layernorm'),
]


@pytest.mark.parametrize('flags', STREAMS, ids=str)
@pytest.mark.parametrize('T', [1, 6, 25])
def test_greedy_generation_takes_the_most_probable_token_with_and_without_a_cache(flags, T):
    """From prompts shorter and longer than block_size (8), and on past it."""
    model = small_gpt(block_size=8, tie_weights=False, **flags)
    idx = some_ids(2, T)
    expected = torch.tensor([greedy_reference(model, row, 14) for row in idx.tolist()])
    for use_cache in (True, False):
        out = model.generate(idx, 14, temperature=0, use_cache=use_cache)
        assert torch.equal(out, expected)


@pytest.mark.parametrize('use_cache', [True, False])
@pytest.mark.parametrize('flags', STREAMS, ids=str)
def test_rows_of_different_lengths_give_the_tokens_of_each_alone_up_to_a_stop_token(
        flags, use_cache):
    model = small_gpt(block_size=8, tie_weights=False, **flags)
    stop = (4, 6)
    new_lengths = set()
    for case, lengths in enumerate([(1, 1, 5, 12), (4, 1, 5, 12), (7, 3, 2, 9), (5, 5, 5, 5)]):
        rows = [some_ids(n, seed=10 * case + i).tolist() for i, n in enumerate(lengths)]
        T = max(lengths)
        padded = torch.tensor([[-1] * (T - len(row)) + row for row in rows])
        out = model.generate(padded, 12, temperature=0, stop=stop, use_cache=use_cache)
        alone = [greedy_reference(model, row, 12, stop)[len(row):] for row in rows]
        # Generation stops when all rows have ended.
        assert out.shape[1] == T + max(len(new) for new in alone)
        for new, expected in zip(out[:, T:].tolist(), alone):
            assert new == expected + [-1] * (len(new) - len(expected))
        new_lengths.update(len(new) for new in alone)
    assert len(new_lengths) > 2


def test_while_decoding_only_the_last_logits_are_computed():
    model = small_gpt()
    shapes = []

    def keep_shape(_, args, output):
        shapes.append(tuple(output.shape))

    model.lm_head.register_forward_hook(keep_shape)
    model.generate(some_ids(3, 9), 4)
    assert shapes == [(3, 11)] * 4


def test_the_same_state_of_the_generator_gives_the_same_tokens():
    model = small_gpt()
    idx = some_ids(2, 3)

    def sampled(seed, use_cache=True):
        return model.generate(idx, 30, generator=seeded(seed), use_cache=use_cache)

    assert torch.equal(sampled(5), sampled(5))
    assert not torch.equal(sampled(5), sampled(6))
    assert torch.equal(sampled(5), sampled(5, use_cache=False))
    global_state = torch.get_rng_state()
    sampled(7)
    assert torch.equal(torch.get_rng_state(), global_state)


@pytest.mark.parametrize('use_cache', [True, False])
def test_greedy_generation_takes_the_most_probable_token_that_is_not_suppressed(use_cache):
    model = small_gpt(tie_weights=False)
    idx = some_ids(2, 5)
    suppress = [2, 3, 7]
    plain = model.generate(idx, 12, temperature=0)
    assert torch.isin(plain[:, 5:], torch.tensor(suppress)).any()
    out = model.generate(idx, 12, temperature=0, suppress=suppress, use_cache=use_cache)
    with torch.no_grad():
        logits = model(out[:, :-1])[0][:, 4:]
    logits[..., suppress] = -math.inf
    assert torch.equal(out[:, 5:], logits.argmax(-1))


@pytest.mark.parametrize('settings', [dict(), dict(temperature=5e-324), dict(top_k=6)], ids=str)
def test_suppressed_tokens_are_never_sampled_and_the_others_keep_their_ratios(settings):
    model = small_gpt()
    prompt = torch.tensor([[3, 1, 4]])
    suppress = [0, 5, 6, 9]
    n = 4000
    out = model.generate(prompt.expand(n, 3), 1, **settings, suppress=suppress,
                         generator=seeded(0))
    frequency = torch.bincount(out[:, 3], minlength=11) / n
    assert (frequency[suppress] == 0).all()
    with torch.no_grad():
        logits = model(prompt)[0][:, -1]
    logits[:, suppress] = -math.inf
    # Within five standard deviations of the frequency of a token.
    assert close(frequency, sampling_probs(logits, **settings)[0], 5 * math.sqrt(0.25 / n))


@pytest.mark.parametrize('training', [True, False])
def test_evaluation_mode_switches_dropout_off_and_restores_the_mode(training):
    model = small_gpt(dropout=0.5).train(training)
    idx = some_ids(1, 9)
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        assert close(model(idx)[0], small_gpt()(idx)[0], 1e-6)
        with evaluation_mode(model):
            pass
        assert not model.training
    assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize('training', [True, False])
def test_evaluation_mode_restores_the_mode_after_an_error(training):
    model = small_gpt(dropout=0.5).train(training)
    with pytest.raises(KeyError):
        with evaluation_mode(model):
            raise KeyError
    assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize('training', [True, False])
def test_generation_runs_in_eval_mode_and_keeps_the_mode_of_the_model(training):
    model = small_gpt(dropout=0.5).train(training)
    idx = some_ids(1, 3)
    out = model.generate(idx, 5, temperature=0)
    assert model.training is training
    assert torch.equal(out, small_gpt().generate(idx, 5, temperature=0))  # without dropout


@pytest.mark.parametrize('training', [True, False])
def test_a_stream_that_is_dropped_halfway_leaves_the_mode_of_the_model_unchanged(training):
    model = small_gpt(dropout=0.5).train(training)
    stream = model.stream(some_ids(1, 3), 5)
    next(stream)
    next(stream)
    # Between two tokens, while the stream is suspended, nothing is changed either.
    assert all(module.training is training for module in model.modules())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    del stream
    assert all(module.training is training for module in model.modules())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize('training', [True, False])
def test_generation_that_fails_leaves_the_mode_of_the_model_unchanged(training):
    model = small_gpt(dropout=0.5).train(training)
    with pytest.raises(IndexError):
        model.generate(torch.tensor([[99]]), 5)  # 99 is not in the vocabulary
    assert all(module.training is training for module in model.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize('use_cache', [True, False])
@pytest.mark.parametrize('temperature', [0.0, 1.0])
@pytest.mark.parametrize('flags', STREAMS, ids=str)
def test_two_interleaved_streams_give_the_ids_of_each_alone(flags, temperature, use_cache):
    model = small_gpt(block_size=8, tie_weights=False, **flags)
    prompts = [some_ids(2, 9), some_ids(1, 4, seed=1)]

    def stream(number):
        return model.stream(prompts[number], 12, temperature, use_cache=use_cache,
                            generator=seeded(number))

    # Both streams have 12 steps: (12, 2) and (12, 1).
    first_alone = torch.stack(list(stream(0)))
    second_alone = torch.stack(list(stream(1)))
    first_ids = []
    second_ids = []
    for first, second in zip(stream(0), stream(1)):
        first_ids.append(first)
        second_ids.append(second)
    assert torch.equal(torch.stack(first_ids), first_alone)
    assert torch.equal(torch.stack(second_ids), second_alone)
    assert first_alone.shape == (12, 2) and second_alone.shape == (12, 1)


@pytest.mark.parametrize('use_cache', [True, False])
def test_weights_changed_during_a_stream_are_used_for_the_next_token(use_cache):
    model = small_gpt(tie_weights=False)
    idx = some_ids(4, 5)

    def most_probable_next(idx):
        with torch.no_grad():
            return model(idx)[0][:, -1].argmax(-1)

    stream = model.stream(idx, 3, temperature=0, use_cache=use_cache)
    first = next(stream)
    assert torch.equal(first, most_probable_next(idx))
    idx = torch.cat((idx, first[:, None]), dim=1)
    with_old_weights = most_probable_next(idx)
    # The keys and values in the cache do not depend on these two matrices.
    with torch.no_grad():
        model.h[-1].mlp.c_proj.weight.neg_()
        model.lm_head.weight.neg_()
    second = next(stream)
    assert torch.equal(second, most_probable_next(idx))
    assert not torch.equal(second, with_old_weights)


@pytest.mark.parametrize('idx', [
    torch.empty(1, 0, dtype=torch.long),
    torch.tensor([[1, 2], [-1, -1]]),
    torch.tensor([[1, 2], [1, -1]]),
], ids=['no token', 'a row of padding', 'padding on the right'])
def test_a_prompt_without_a_token_at_the_end_is_refused(idx):
    with pytest.raises(ValueError, match='token at the end of every row'):
        small_gpt().generate(idx, 3)


@pytest.mark.parametrize('name, value', [
    ('temperature', -1.0), ('top_k', -1), ('top_p', 0.0), ('top_p', 1.5)])
def test_impossible_sampling_settings_are_refused_with_their_value(name, value):
    with pytest.raises(ValueError, match=f'{name} {value}'):
        small_gpt().generate(some_ids(1, 3), 3, **{name: value})


def test_an_encoder_cannot_generate():
    with pytest.raises(ValueError, match='causal False'):
        small_gpt(causal=False).generate(some_ids(1, 3), 3)


def test_learned_positions_refuse_more_than_block_size_tokens():
    message = "17 tokens do not fit in block_size 16, which pos 'learned'"
    with pytest.raises(ValueError, match=message):
        small_gpt(pos='learned')(some_ids(1, 17))


# -----------------------------------------------------------------------------
# Faster decoding on a CPU (sample.py)

# Each way to decode: the dtype of the weights, and whether bfloat16 autocast is on.
PRECISIONS = {
    'float32': (torch.float32, False),
    'bfloat16': (torch.bfloat16, False),
    'autocast': (torch.float32, True),
}
# A CPU that multiplies in bfloat16 is tested as one that does not, too.
NATIVE = sorted({False, has_fast_bfloat16('cpu')})


@pytest.fixture(params=NATIVE, ids=lambda native: f'native={native}')
def native_bfloat16(request, monkeypatch):
    """Whether the CPU multiplies in bfloat16, as sample.py finds it; with two cores."""
    monkeypatch.setattr(sample, 'has_fast_bfloat16', lambda device_type: request.param)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    return request.param


def larger_gpt(dtype=torch.float32, **flags):
    """A model with some layers that are large enough to be replaced."""
    sizes = dict(n_embd=256, vocab_size=1100, block_size=32)
    return small_gpt(**sizes, bias=True, **flags).to(dtype)


def replaced_layers(model):
    return [name for name, module in model.named_modules() if 'forward' in vars(module)]


def is_faster_way_known(precision, n_rows, native):
    """A single row or two in emulated bfloat16 is the one case that has no faster way."""
    return precision != 'bfloat16' or n_rows > 2 or native


@pytest.mark.parametrize('dtype, tolerance', [
    (torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize('n_out', [3100, 3001])  # 3,001 rows cannot be shared by two cores
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('native', NATIVE)
def test_fast_linear_is_the_same_product(monkeypatch, dtype, tolerance, n_out, bias, native):
    torch.manual_seed(0)
    monkeypatch.setattr(sample, 'has_fast_bfloat16', lambda device_type: native)
    layer = torch.nn.Linear(88, n_out, bias=bias).to(dtype)
    shapes = [(1, 88), (1, 1, 88), (4, 1, 88), (4, 5, 88), (0, 88)]
    n_found = 0
    for threads, n_rows in itertools.product((1, 2), (1, 4)):
        monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
        forward = fast_linear(layer, n_rows, dtype)
        if forward is None:
            continue
        n_found += 1
        # It may be called with any number of rows.
        for shape in shapes:
            x = torch.randn(shape, dtype=dtype)
            expected = x.double() @ layer.weight.double().T
            if bias:
                expected = expected + layer.bias.double()
            y = forward(x)
            assert y.dtype == dtype and y.shape == expected.shape
            assert y.numel() == 0 or close(y, expected, tolerance)
    assert (n_found > 0) == (dtype != torch.float64)


def test_fast_linear_leaves_small_layers_as_they_are():
    assert fast_linear(torch.nn.Linear(24, 11), 4, torch.float32) is None


def decoded_logits(model, idx):
    """The logits after a prompt of 5 tokens and after each further one, (B, T - 4, V)."""
    with torch.no_grad():
        cache = model.new_cache(idx.size(0))
        logits = [model(idx[:, :5], cache=cache)[0][:, -1:]]
        for t in range(5, idx.size(1)):
            logits.append(model(idx[:, t:t + 1], cache=cache)[0])
        return torch.cat(logits, dim=1)


@pytest.mark.parametrize('n_rows', [1, 2, 4])
@pytest.mark.parametrize('precision', PRECISIONS)
def test_fast_decoding_gives_the_plain_logits_up_to_rounding(precision, n_rows, native_bfloat16):
    dtype, autocast = PRECISIONS[precision]
    model = larger_gpt(dtype)
    idx = some_ids(n_rows, 15, vocab_size=1100)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        plain = decoded_logits(model, idx)
        with fast_decoding(model, n_rows):
            is_replaced = bool(replaced_layers(model))
            fast = decoded_logits(model, idx)
    assert is_replaced == is_faster_way_known(precision, n_rows, native_bfloat16)
    # The largest error: in float32 of rounding in another order, in bfloat16 of 8 bits.
    tolerance = 1e-5 if precision == 'float32' else 0.1
    assert largest_gap(fast.float(), plain.float()) < tolerance * plain.float().std()


@pytest.mark.parametrize('n_rows', [1, 4])
@pytest.mark.parametrize('precision', PRECISIONS)
def test_fast_decoding_generates_the_most_probable_tokens_up_to_rounding(
        precision, n_rows, native_bfloat16):
    dtype, autocast = PRECISIONS[precision]
    model = larger_gpt(dtype)
    prompt = some_ids(n_rows, 5, vocab_size=1100)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        with fast_decoding(model, n_rows):
            out = model.generate(prompt, 10, temperature=0)
    with torch.no_grad():
        logits = model.double()(out[:, :-1])[0][:, 4:]
    largest = logits.max(-1).values
    of_selected = logits.gather(-1, out[:, 5:, None])[..., 0]
    tolerance = 1e-4 if precision == 'float32' else 0.05
    assert (largest - of_selected).max() < tolerance * logits.std()


@pytest.mark.parametrize('n_rows', [1, 4])
@pytest.mark.parametrize('precision', PRECISIONS)
def test_after_fast_decoding_the_layers_are_plain_and_use_changed_weights(
        precision, n_rows, native_bfloat16):
    dtype, autocast = PRECISIONS[precision]
    model = larger_gpt(dtype, tie_weights=False)
    idx = some_ids(n_rows, 15, vocab_size=1100)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        initial = decoded_logits(model, idx)
    # The sign of the output layer, and so of the logits, changes from round to round.
    for sign in (1, -1, 1):
        expected = sign * initial
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            with fast_decoding(model, n_rows):
                fast = decoded_logits(model, idx)
                stream = model.stream(idx, 5)
                next(stream)  # a stream that is dropped halfway
            assert replaced_layers(model) == []
            assert torch.equal(decoded_logits(model, idx), expected)
        assert largest_gap(fast.float(), expected.float()) < 0.1 * expected.float().std()
        with torch.no_grad():
            model.lm_head.weight.neg_()
    # The layers are trained again.
    model(idx, idx)[1].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_fast_decoding_restores_the_layers_when_its_body_raises(native_bfloat16):
    model = larger_gpt()
    idx = some_ids(4, 15, vocab_size=1100)
    plain = decoded_logits(model, idx)
    with pytest.raises(KeyError):
        with fast_decoding(model, 4):
            assert replaced_layers(model)
            raise KeyError
    assert replaced_layers(model) == []
    assert torch.equal(decoded_logits(model, idx), plain)


def test_fast_decoding_inside_another_leaves_the_layers_to_the_outer_one(native_bfloat16):
    model = larger_gpt()
    with fast_decoding(model, 4):
        outer = replaced_layers(model)
        with fast_decoding(model, 4):
            assert replaced_layers(model) == outer
        assert replaced_layers(model) == outer != []
    assert replaced_layers(model) == []


def test_fast_decoding_restores_autocast(native_bfloat16):
    model = larger_gpt()
    with torch.autocast('cpu', torch.bfloat16):
        with fast_decoding(model, 4):
            assert not torch.is_autocast_enabled('cpu')
        assert torch.is_autocast_enabled('cpu')


def test_fast_decoding_changes_nothing_on_another_device():
    with torch.device('meta'):
        model = GPT(GPTConfig(n_embd=512))
    with fast_decoding(model, 4):
        assert replaced_layers(model) == []


# -----------------------------------------------------------------------------
# Hidden states, padding and heads

PADDINGS = [(0, 0), (3, 0), (0, 4), (2, 2)]


def with_padding(ids, left, right):
    """The ids (1, T) and their positions, with padding on both sides."""
    idx = [-1] * left + ids + [-1] * right
    pos = [-1] * left + list(range(len(ids))) + [-1] * right
    return torch.tensor([idx]), torch.tensor([pos])


@pytest.mark.parametrize('attn', ['manual', 'sdpa'])
@pytest.mark.parametrize('flags', [
    dict(),
    dict(GPT2),
    dict(pos='sinusoidal'),
    dict(window=2, n_sink=1),
    dict(causal=False),
    dict(causal=False, **GPT2),
    dict(causal=False, n_expert=3),
], ids=str)
def test_padding_changes_no_hidden_state_and_no_score(flags, attn):
    """A decoder's score is that of the last token, an encoder's the mean over all tokens."""
    model = small_gpt(attn=attn, **flags)
    reward_model = RewardModel(model).eval()
    torch.nn.init.normal_(reward_model.head.proj.weight, std=1.0)
    ids = some_ids(7).tolist()
    alone = model.hidden(torch.tensor([ids]))
    read = alone[0, -1] if model.config.causal else alone[0].mean(0)
    head = reward_model.head.proj
    expected = (read @ head.weight[0] + head.bias[0]).item()
    for left, right in PADDINGS:
        idx, pos = with_padding(ids, left, right)
        h = model.hidden(idx, pos=pos)
        assert h.isfinite().all()
        assert close(h[0, left:left + 7], alone[0])
        assert abs(reward_model(idx).item() - expected) < 1e-3


@pytest.mark.parametrize('flags', [
    dict(), dict(GPT2), dict(causal=False), dict(n_expert=3), dict(window=4, n_sink=1)], ids=str)
def test_hidden_at_selected_tokens_equals_the_selection_from_all(flags):
    """Hidden states and gradients, with every kind of index for `read`."""
    model = small_gpt(n_layer=2, **flags)
    pos = torch.tensor([[-1, -1, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, -1, -1]])
    idx = torch.where(pos < 0, -1, some_ids(2, 8))
    mask = (pos == 1) | (pos >= 4)
    parameters = list(model.parameters())

    def gradients_of(h):
        return torch.autograd.grad(h.square().sum(), parameters, allow_unused=True)

    for read in (mask.nonzero(as_tuple=True), mask, (slice(None), 5)):
        selected = model.hidden(idx, pos=pos, read=read)
        from_all = model.hidden(idx, pos=pos)[read]
        assert close(selected, from_all)
        for a, b in zip(gradients_of(selected), gradients_of(from_all)):
            if b is not None:
                assert close(a, b, 1e-4)
    idx = idx.clamp(min=0)
    assert close(model(idx, read=(slice(None), 5))[0], model(idx)[0][:, 5])


def test_a_scalar_head_is_a_linear_map_of_each_token():
    h = torch.randn(2, 5, 16)
    head = ScalarHead(16, std=0.5)
    expected = torch.einsum('btc,c->bt', h, head.proj.weight[0])
    assert close(head(h), expected, 1e-5)


def test_a_scalar_head_starts_with_the_given_spread_and_by_default_at_zero():
    assert (ScalarHead(16)(torch.randn(2, 5, 16)) == 0).all()
    torch.manual_seed(0)
    assert abs(ScalarHead(4000, std=0.5).proj.weight.std() / 0.5 - 1) < 0.05


def test_a_scalar_head_is_float32_under_bfloat16_autocast():
    torch.manual_seed(0)
    h = torch.randn(2, 5, 16)
    head = ScalarHead(16, std=0.5)
    for h in (h, h.bfloat16()):
        expected = head(h)
        with torch.autocast('cpu', torch.bfloat16):
            values = head(h)
        assert values.dtype == torch.float32 and torch.equal(values, expected)


# -----------------------------------------------------------------------------
# Settings

IMPOSSIBLE = [
    (dict(n_embd=18), 'n_embd 18', 'n_head 4'),
    (dict(n_kv_head=3), 'n_head 4', 'n_kv_head 3'),
    (dict(n_embd=12), "pos 'rope'", 'head_dim 3'),
    (dict(head_dim=5), "pos 'rope'", 'head_dim 5'),
    (dict(pos='sinusoidal', n_embd=9, n_head=1), "pos 'sinusoidal'", 'n_embd 9'),
    (dict(window=17), 'window 17', 'block_size 16'),
    (dict(window=10, n_sink=7), 'n_sink 7', 'block_size 16'),
    (dict(n_sink=16), 'n_sink 16', 'block_size 16'),
    (dict(causal=False, window=4), 'causal False', 'window 4'),
    (dict(causal=False, n_sink=4), 'causal False', 'n_sink 4'),
    (dict(n_expert=2, n_expert_active=3), 'n_expert_active 3', 'n_expert 2'),
    (dict(n_expert=2, n_expert_active=0), 'n_expert_active 0', 'n_expert 2'),
    (dict(n_expert=2, moe_every=3), 'moe_every 3', 'n_layer 2'),
    (dict(n_shared_expert=1), 'n_shared_expert 1', 'n_expert 0'),
    (dict(n_expert=2, n_shared_expert=-1), 'n_shared_expert -1', 'n_expert 2'),
]
for name in ('norm', 'pos', 'rope_scaling', 'mlp', 'attn', 'moe_balance'):
    IMPOSSIBLE.append(({name: 'best'}, name, "got 'best'"))
for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'moe_every'):
    IMPOSSIBLE.append(({name: 0}, name, 'got 0'))
for name in ('n_kv_head', 'head_dim', 'n_hidden', 'window', 'n_sink', 'n_expert'):
    IMPOSSIBLE.append(({name: -1}, name, 'got -1'))


@pytest.mark.parametrize('flags, first, second', IMPOSSIBLE, ids=[str(i[0]) for i in IMPOSSIBLE])
def test_an_impossible_config_is_refused_in_one_line_that_names_the_settings(flags, first, second):
    with pytest.raises(ValueError) as error:
        GPTConfig(**SMALL | flags)
    message = str(error.value)
    assert first in message and second in message and '\n' not in message


CONFIGS = [
    dict(),
    dict(mlp='relu2', n_kv_head=2, head_dim=6),
    dict(n_expert=3, window=4),
    dict(n_hidden=40),
]


@pytest.mark.parametrize('flags', CONFIGS, ids=str)
def test_a_config_is_rebuilt_from_its_dict(flags):
    config = GPTConfig(**SMALL | flags)
    assert GPTConfig(**asdict(config)) == config


@pytest.mark.parametrize('flags', CONFIGS, ids=str)
def test_a_resolved_config_has_no_default_left_and_describes_the_same_model(flags):
    config = GPTConfig(**SMALL | flags)
    resolved = config.resolved()
    derived = {'n_kv_head': config.kv_heads, 'head_dim': config.head_size,
               'n_hidden': config.hidden_size}
    assert 0 not in derived.values()
    assert resolved == asdict(config) | derived
    # The same parameters, with the same initial values.
    torch.manual_seed(0)
    state = GPT(config).state_dict()
    torch.manual_seed(0)
    resolved_state = GPT(GPTConfig(**resolved)).state_dict()
    assert state.keys() == resolved_state.keys()
    for name, p in state.items():
        assert torch.equal(p, resolved_state[name])


def test_derived_sizes_follow_a_changed_setting():
    config = GPTConfig(n_embd=128, n_head=4)
    assert (config.kv_heads, config.head_size, config.hidden_size) == (4, 32, 344)
    wider = replace(config, n_embd=256, n_head=8)
    assert (wider.kv_heads, wider.head_size, wider.hidden_size) == (8, 32, 680)
    assert replace(config, mlp='gelu').hidden_size == 512
    given = replace(config, n_kv_head=2, head_dim=16, n_hidden=100)
    assert (given.kv_heads, given.head_size, given.hidden_size) == (2, 16, 100)


def all_flags():
    """
    Every combination of the flags that change what is computed. The other flags (attn, bias, ...)
    take turns.
    """
    others = itertools.cycle([
        dict(attn='manual'),
        dict(attn='sdpa', bias=True),
        dict(attn='auto', qkv_bias=True),
        dict(attn='manual', bias=True, tie_weights=False),
        dict(attn='sdpa', head_dim=6),
    ])
    visibility = [
        dict(),
        dict(window=3),
        dict(n_sink=2),
        dict(window=3, n_sink=2),
        dict(causal=False),
    ]
    combinations = itertools.product(KINDS, (4, 2), (False, True), (0, 3), visibility)
    for kind, n_kv_head, qk_norm, n_expert, visible_flags in combinations:
        norm, pos, mlp = kind
        yield dict(norm=norm, pos=pos, mlp=mlp, n_kv_head=n_kv_head, qk_norm=qk_norm,
                   n_expert=n_expert, **visible_flags, **next(others))


def test_every_combination_of_flags_trains_and_generates():
    """
    One step of training reaches every parameter and lowers the loss, with a balancing loss for
    experts. Then three tokens are generated, past the end of the block.
    """
    idx = some_ids(2, 8)
    targets = some_ids(2, 8, seed=1)
    n_combinations = 0
    for flags in all_flags():
        n_combinations += 1
        torch.manual_seed(0)
        model = GPT(GPTConfig(**SMALL | dict(block_size=8) | flags))
        [optimizer] = model.optimizers('adamw', 1e-3, 0.1, (0.9, 0.95))
        loss = model(idx, targets)[1]
        (loss + 0.01 * model.aux_loss()).backward()
        for p in model.parameters():
            assert p.grad is not None and p.grad.isfinite().all(), flags
        optimizer.step()
        with torch.no_grad():
            assert loss.isfinite() and model(idx, targets)[1] < loss, flags
        if model.config.causal:
            out = model.generate(idx[:, :7], 3, generator=seeded(0))
            assert out.shape == (2, 10), flags
            assert ((0 <= out) & (out < 11)).all(), flags
    assert n_combinations == 720
