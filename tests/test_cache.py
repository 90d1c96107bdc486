"""
What the cache of keys and values promises: the same numbers as without it, within a memory that never grows.
Independent of it: the model without a cache, and `slow_gpt`, plain loops over the rule of who sees whom.
"""
import itertools, random
import numpy as np
import pytest
import torch

from model import rope_table, rotate
from test_model import close, largest_gap, slow_gpt, small_gpt, some_ids

BLOCK = 8


def feed(model, cache, idx, sizes, pos=None):
    """Put idx (B, T) into the cache in chunks of the given sizes, over and over; the logits (B, T, V)."""
    out, t = [], 0
    with torch.no_grad():
        for size in itertools.cycle(sizes):
            if t >= idx.size(1):
                return model.lm_head(torch.cat(out, dim=1))
            chunk = slice(t, t + size)
            out.append(model.hidden(idx[:, chunk], cache, None if pos is None else pos[:, chunk]))
            t += size


def alone(model, idx):
    with torch.no_grad():
        return model(idx)[0]


def random_case(rng):
    """Flags of a model, the lengths of the rows, and the sizes of the chunks: one token, a few, more than the window."""
    flags = dict(norm=rng.choice(['layernorm', 'rmsnorm']), pos=rng.choice(['learned', 'sinusoidal', 'rope', 'rope']),
                 mlp=rng.choice(['gelu', 'swiglu', 'relu2']), n_kv_head=rng.choice([1, 2, 4]), qk_norm=rng.random() < 0.3,
                 window=rng.choice([0, 0, 1, 3, 5]), n_sink=rng.choice([0, 0, 1, 3]), attn=rng.choice(['sdpa', 'manual']))
    longest = rng.randint(1, BLOCK if flags['pos'] == 'learned' else 5 * BLOCK)  # several turns of the ring
    lengths = [longest, *(rng.randint(1, longest) for _ in range(2))] if rng.random() < 0.5 else [longest] * 2
    sizes = rng.choice([[1], [longest], [rng.randint(1, longest), 1], [rng.randint(1, 12) for _ in range(6)]])
    return flags, lengths, sizes


@pytest.mark.parametrize('seed', range(8))
def test_cached_logits_equal_uncached_ones(seed):
    """50 random cases; rows of different lengths are padded on the left. Each equals that row alone, uncached."""
    rng = random.Random(seed)
    for case in range(50):
        flags, lengths, sizes = random_case(rng)
        model = small_gpt(case, block_size=BLOCK, **flags)
        T, idx = max(lengths), some_ids(len(lengths), max(lengths), seed=case)
        pos = torch.stack([torch.arange(T) - (T - n) for n in lengths]).clamp(min=-1)
        padded, cache = idx.masked_fill(pos < 0, -1), model.new_cache(len(lengths))
        cached = feed(model, cache, padded, sizes, pos if len(lengths) == 3 else None)
        for row, n in enumerate(lengths):
            uncached = alone(model, idx[row:row + 1, T - n:])[0]
            assert close(cached[row, T - n:], uncached, 1e-4), (flags, lengths, sizes)


@pytest.mark.parametrize('pos', ['rope', 'sinusoidal'])
@pytest.mark.parametrize('window, n_sink, n_kv_head', [
    (0, 0, 4), (0, 1, 2), (0, 3, 4), (3, 0, 1), (3, 2, 2), (1, 4, 4), (4, 4, 2)])
def test_streaming_past_block_size_equals_plain_loops_over_the_rule(window, n_sink, n_kv_head, pos):
    """Ten blocks. A query at p sees a key at k <= p if p - k < window (by default block_size - n_sink) or k < n_sink.
    RoPE takes the distance p - k, but sinks are seen from min(p, block_size - 1)."""
    model = small_gpt(block_size=BLOCK, window=window, n_sink=n_sink, n_kv_head=n_kv_head, pos=pos)
    idx = some_ids(1, 10 * BLOCK)
    expected = slow_gpt(model, idx[0].tolist())
    for sizes in ([1], [5], [BLOCK], [13, 1, 1]):
        assert close(feed(model, model.new_cache(1), idx, sizes)[0], expected, 1e-3), sizes
    assert close(alone(model, idx)[0], expected, 1e-3)


@pytest.mark.parametrize('window, n_sink', [(0, 0), (0, 2), (3, 0), (3, 2)])
def test_past_block_size_a_layer_cannot_tell_how_far_it_has_come(window, n_sink):
    """The same sinks and the same last tokens, after 9 tokens or 70: every distance is one that was trained on."""
    model = small_gpt(block_size=BLOCK, window=window, n_sink=n_sink, n_layer=1)
    begin, end, between = some_ids(1, n_sink), some_ids(1, BLOCK - n_sink, seed=1), some_ids(1, 70, seed=2)
    texts = [torch.cat((begin, between[:, :n], end), dim=1) for n in (9, 40, 70)]
    ends = [feed(model, model.new_cache(1), text, [1])[0, -1] for text in texts]
    assert close(ends[0], ends[1]) and close(ends[0], ends[2])
    other = torch.cat((begin, between[:, :9], end[:, :-1], (end[:, -1:] + 1) % 11), dim=1)
    assert largest_gap(feed(model, model.new_cache(1), other, [1])[0, -1], ends[0]) > 0.1


def tensors(cache):
    return [x for x in vars(cache).values() if torch.is_tensor(x)]


@pytest.mark.parametrize('window, n_sink', [(0, 0), (0, 3), (3, 0), (3, 2)])
def test_memory_stays_flat_to_the_byte(window, n_sink):
    model = small_gpt(block_size=BLOCK, window=window, n_sink=n_sink, n_kv_head=2)
    cache, sizes = model.new_cache(3), []
    for _ in range(12 * BLOCK):
        feed(model, cache, some_ids(3, 1), [1])
        sizes.append([(x.data_ptr(), x.untyped_storage().nbytes()) for x in (cache.k, cache.v)]
                     + [sum(x.untyped_storage().nbytes() for x in tensors(cache))])
    assert all(size == sizes[0] for size in sizes)
    slots = (window or BLOCK - n_sink) + n_sink + 1  # and one for what need not be kept
    float32, layers, rows, heads, size = 4, 2, 3, 2, 4
    assert cache.k.nbytes == cache.v.nbytes == float32 * layers * rows * heads * slots * size
    feed(model, cache, some_ids(3, 50), [50])  # a long chunk
    assert sizes[0][:2] == [(x.data_ptr(), x.untyped_storage().nbytes()) for x in (cache.k, cache.v)]


@pytest.mark.parametrize('window, n_sink', [(0, 0), (0, 3), (1, 0), (3, 0), (3, 2), (2, 6)])
def test_the_cache_holds_exactly_the_sinks_and_the_last_window(window, n_sink):
    rng = random.Random(0)
    model = small_gpt(block_size=BLOCK, window=window, n_sink=n_sink, n_layer=1)
    for lengths in ([60, 60], [60, 41]):
        cache, t = model.new_cache(2), 0
        pos = torch.stack([torch.arange(60) - (60 - n) for n in lengths]).clamp(min=-1)
        while t < 60:
            step = rng.choice([1, 1, 2, 7, 15])
            feed(model, cache, some_ids(2, 60)[:, t:t + step], [step], pos[:, t:t + step])
            t += step
            written = [slot for slot in cache.slot.tolist()[0] if slot < (window or BLOCK - n_sink) + n_sink]
            assert len(set(written)) == len(written)  # of two tokens written to one slot, a GPU keeps either
            for row, held in enumerate(cache.pos.tolist()):
                seen = pos[row, :t][pos[row, :t] >= 0].tolist()
                kept = sorted({*seen[:n_sink], *seen[n_sink:][-(window or BLOCK - n_sink):]})
                assert sorted(p for p in held if p >= 0) == kept
                assert cache.length[row] == len(seen)


def test_a_cache_for_few_tokens_is_small_and_says_so_when_they_are_more():
    model = small_gpt(block_size=1000)
    small, large = model.new_cache(2, 12), model.new_cache(2)
    assert small.k.nbytes * 1001 == large.k.nbytes * 13
    idx = some_ids(2, 12)
    assert close(feed(model, small, idx, [5, 1]), alone(model, idx), 1e-4)
    with pytest.raises(ValueError, match='13 tokens do not fit in a cache for 12'):
        feed(model, small, idx[:, :1], [1])
    few = small_gpt(block_size=1000, window=5)  # its window is smaller still: this cache never ends
    assert few.new_cache(2, 12).k.nbytes == few.new_cache(2).k.nbytes
    assert close(feed(few, few.new_cache(2, 12), some_ids(2, 40), [3]), alone(few, some_ids(2, 40)), 1e-4)


def test_the_cache_of_a_cpu_is_float32_at_least():
    """Whose attention is slower in bfloat16."""
    model = small_gpt()
    assert model.new_cache(1).k.dtype == torch.float32 and model.double().new_cache(1).k.dtype == torch.float64
    model = small_gpt(qk_norm=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        cache = model.new_cache(2)
        idx = some_ids(2, 16)
        assert close(feed(model, cache, idx, [5, 1]), alone(model, idx), 0.1)
    assert cache.k.dtype == model.bfloat16().new_cache(1).k.dtype == torch.float32
    assert close(feed(model, model.new_cache(2), idx, [5, 1]), alone(model, idx), 0.1)


def test_learned_positions_cannot_pass_block_size():
    model = small_gpt(block_size=BLOCK, pos='learned')
    cache = model.new_cache(1)
    feed(model, cache, some_ids(1, BLOCK), [BLOCK])
    with pytest.raises(ValueError, match=f"{BLOCK + 1} tokens do not fit in block_size {BLOCK}, which pos 'learned'"):
        feed(model, cache, some_ids(1, 1), [1])


def test_an_encoder_has_no_cache():
    model = small_gpt(causal=False)
    with pytest.raises(ValueError, match='causal False'):
        feed(model, model.new_cache(1), some_ids(1, 3), [1])


def test_experts_go_through_the_cache_too():
    model, idx = small_gpt(n_expert=4, n_kv_head=2, window=5), some_ids(2, 40)
    assert close(feed(model, model.new_cache(2), idx, [7, 1, 1]), alone(model, idx), 1e-4)


def test_rope_is_exact_a_million_tokens_on():
    """Scores of queries at 1,000,000 + i with keys at 1,000,000 + j against complex numbers in float64."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 50, 64).unbind()
    pos = torch.arange(50)[None] + 10 ** 6
    turned = rotate(q, rope_table(pos, 64, 1e4)) @ rotate(k, rope_table(pos, 64, 1e4)).mT
    a, b = (x[0, 0, :, :32].double().numpy() + 1j * x[0, 0, :, 32:].double().numpy() for x in (q, k))
    rate = 1e4 ** (-np.arange(32) / 32)
    distance = np.arange(50)[:, None] - np.arange(50)
    exact = np.einsum('id,jd,ijd->ij', a, b.conj(), np.exp(1j * distance[..., None] * rate)).real
    assert np.abs(turned[0, 0].numpy() - exact).max() < 1e-5 * np.abs(exact).max()


def test_a_model_says_the_same_a_million_tokens_on():
    model, idx = small_gpt(n_kv_head=2), some_ids(2, 16)
    pos = torch.arange(16).expand(2, 16)
    assert close(model.hidden(idx, pos=pos + 10 ** 6), model.hidden(idx, pos=pos), 1e-4)
