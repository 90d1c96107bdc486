"""
The contract of the cache of keys and values: the same numbers as without it, in memory that never
grows. It is compared with the model without a cache, and with numpy_gpt, plain loops over the rule
of which query sees which key.
"""
import itertools
import random

import numpy as np
import pytest
import torch

from model import GPTConfig, KVCache, rope_frequencies, rope_table, rotate
from test_model import as_complex, close, largest_gap, numpy_gpt, small_gpt, some_ids

BLOCK = 8


def cached_logits(model, cache, idx, chunk_sizes, pos=None):
    """
    The logits (B, T, V) of idx (B, T), which is put into the cache in chunks. Their sizes are
    repeated until all tokens are in.
    """
    hidden_states = []
    start = 0
    with torch.no_grad():
        for size in itertools.cycle(chunk_sizes):
            if start >= idx.size(1):
                return model.lm_head(torch.cat(hidden_states, dim=1))
            chunk = slice(start, start + size)
            chunk_pos = None if pos is None else pos[:, chunk]
            hidden_states.append(model.hidden(idx[:, chunk], cache, chunk_pos))
            start += size


def uncached_logits(model, idx):
    with torch.no_grad():
        return model(idx)[0]


def left_padded_positions(lengths):
    """The positions (B, T) of rows of these lengths, padded on the left with -1."""
    T = max(lengths)
    rows = [torch.arange(T) - (T - n) for n in lengths]
    return torch.stack(rows).clamp(min=-1)


# -----------------------------------------------------------------------------
# The same numbers

def random_case(rng):
    """Flags of a model, the lengths of the rows, and the sizes of the chunks: one token, a few, or
    more than the window."""
    flags = dict(
        norm=rng.choice(['layernorm', 'rmsnorm']),
        pos=rng.choice(['learned', 'sinusoidal', 'rope', 'rope']),
        mlp=rng.choice(['gelu', 'swiglu', 'relu2']),
        n_kv_head=rng.choice([1, 2, 4]),
        qk_norm=rng.random() < 0.3,
        window=rng.choice([0, 0, 1, 3, 5]),
        n_sink=rng.choice([0, 0, 1, 3]),
        attn=rng.choice(['sdpa', 'manual']),
    )
    # Up to five blocks, so that the ring is overwritten several times.
    longest = rng.randint(1, BLOCK if flags['pos'] == 'learned' else 5 * BLOCK)
    if rng.random() < 0.5:
        lengths = [longest, rng.randint(1, longest), rng.randint(1, longest)]
    else:
        lengths = [longest, longest]
    chunk_sizes = rng.choice([
        [1],
        [longest],
        [rng.randint(1, longest), 1],
        [rng.randint(1, 12) for _ in range(6)],
    ])
    return flags, lengths, chunk_sizes


@pytest.mark.parametrize('seed', range(8))
def test_cached_logits_equal_uncached_logits(seed):
    """50 random cases. Rows of different lengths are padded on the left; each equals that row
    alone."""
    rng = random.Random(seed)
    for case in range(50):
        flags, lengths, chunk_sizes = random_case(rng)
        model = small_gpt(case, block_size=BLOCK, **flags)
        T = max(lengths)
        idx = some_ids(len(lengths), T, seed=case)
        pos = left_padded_positions(lengths)
        padded = idx.masked_fill(pos < 0, -1)
        cache = model.new_cache(len(lengths))
        given_pos = pos if len(lengths) == 3 else None
        cached = cached_logits(model, cache, padded, chunk_sizes, given_pos)
        for row, n in enumerate(lengths):
            uncached = uncached_logits(model, idx[row:row + 1, T - n:])[0]
            assert close(cached[row, T - n:], uncached, 1e-4), (flags, lengths, chunk_sizes)


@pytest.mark.parametrize('pos', ['rope', 'sinusoidal'])
@pytest.mark.parametrize('window, n_sink, n_kv_head', [
    (0, 0, 4), (0, 1, 2), (0, 3, 4), (3, 0, 1), (3, 2, 2), (1, 4, 4), (4, 4, 2)])
def test_streaming_past_block_size_equals_plain_loops(window, n_sink, n_kv_head, pos):
    """
    Ten blocks. A query at p sees a key at k <= p if p - k < window (by default block_size - n_sink)
    or k < n_sink. RoPE uses the distance p - k, but sinks are seen from min(p, block_size - 1).
    """
    model = small_gpt(block_size=BLOCK, window=window, n_sink=n_sink, n_kv_head=n_kv_head, pos=pos)
    idx = some_ids(1, 10 * BLOCK)
    expected = numpy_gpt(model, idx[0].tolist())
    for chunk_sizes in ([1], [5], [BLOCK], [13, 1, 1]):
        cached = cached_logits(model, model.new_cache(1), idx, chunk_sizes)
        assert close(cached[0], expected, 1e-3), chunk_sizes
    assert close(uncached_logits(model, idx)[0], expected, 1e-3)


@pytest.mark.parametrize('window, n_sink', [(0, 0), (0, 2), (3, 0), (3, 2)])
def test_past_block_size_a_layer_depends_only_on_the_sinks_and_the_last_tokens(window, n_sink):
    """The number of tokens before them does not matter: every distance is one that was trained
    on."""
    model = small_gpt(block_size=BLOCK, window=window, n_sink=n_sink, n_layer=1)
    sinks = some_ids(1, n_sink)
    between = some_ids(1, 70, seed=2)
    last_tokens = some_ids(1, BLOCK - n_sink, seed=1)

    def last_logits(*parts):
        idx = torch.cat(parts, dim=1)
        return cached_logits(model, model.new_cache(1), idx, [1])[0, -1]

    after_9 = last_logits(sinks, between[:, :9], last_tokens)
    for n in (40, 70):
        assert close(last_logits(sinks, between[:, :n], last_tokens), after_9)
    # Another last token changes the logits.
    changed = last_tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 11
    assert largest_gap(last_logits(sinks, between[:, :9], changed), after_9) > 0.1


def test_experts_give_the_same_logits_with_a_cache():
    model = small_gpt(n_expert=4, n_kv_head=2, window=5)
    idx = some_ids(2, 40)
    cached = cached_logits(model, model.new_cache(2), idx, [7, 1, 1])
    assert close(cached, uncached_logits(model, idx), 1e-4)


# -----------------------------------------------------------------------------
# Memory

def storages(cache):
    """The address and the bytes of the keys and of the values."""
    return [(x.data_ptr(), x.untyped_storage().nbytes()) for x in (cache.k, cache.v)]


def total_bytes(cache):
    tensors = [x for x in vars(cache).values() if torch.is_tensor(x)]
    return sum(x.untyped_storage().nbytes() for x in tensors)


@pytest.mark.parametrize('window, n_sink', [(0, 0), (0, 3), (3, 0), (3, 2)])
def test_the_memory_of_the_cache_never_changes(window, n_sink):
    model = small_gpt(block_size=BLOCK, window=window, n_sink=n_sink, n_kv_head=2)
    cache = model.new_cache(3)
    storages_at_start = storages(cache)
    bytes_at_start = total_bytes(cache)
    for _ in range(12 * BLOCK):
        cached_logits(model, cache, some_ids(3, 1), [1])
        assert storages(cache) == storages_at_start
        assert total_bytes(cache) == bytes_at_start
    cached_logits(model, cache, some_ids(3, 50), [50])  # a long chunk
    assert storages(cache) == storages_at_start

    # 4 bytes per float32, 2 layers, 3 rows, 2 key/value heads, head size 4; and a spare slot
    n_slots = (window or BLOCK - n_sink) + n_sink + 1
    assert cache.k.nbytes == cache.v.nbytes == 4 * 2 * 3 * 2 * n_slots * 4


@pytest.mark.parametrize('lengths', [[60, 60], [60, 41]], ids=str)
@pytest.mark.parametrize('window, n_sink', [(0, 0), (0, 3), (1, 0), (3, 0), (3, 2), (2, 6)])
def test_the_cache_holds_exactly_the_sinks_and_the_last_window(window, n_sink, lengths,
                                                               monkeypatch):
    assigned = []
    assign_slots = KVCache.assign_slots

    def keep_assigned(cache, pos):
        slot, k_pos = assign_slots(cache, pos)
        assigned.append(slot)
        return slot, k_pos

    monkeypatch.setattr(KVCache, 'assign_slots', keep_assigned)
    rng = random.Random(0)
    model = small_gpt(block_size=BLOCK, window=window, n_sink=n_sink, n_layer=1)
    idx = some_ids(2, 60)
    pos = left_padded_positions(lengths)
    cache = model.new_cache(2)
    n_kept = window or BLOCK - n_sink
    n_put = 0
    while n_put < 60:
        size = rng.choice([1, 1, 2, 7, 15])
        chunk = slice(n_put, n_put + size)
        cached_logits(model, cache, idx[:, chunk], [size], pos[:, chunk])
        n_put += size

        # No slot but the spare one is written twice: a GPU would keep either token.
        for row in assigned[-1].tolist():
            written = [slot for slot in row if slot < n_kept + n_sink]
            assert len(set(written)) == len(written)

        # The positions in the cache are those of the sinks and of the last window.
        for row in range(2):
            so_far = [p for p in pos[row, :n_put].tolist() if p >= 0]
            expected = {*so_far[:n_sink], *so_far[n_sink:][-n_kept:]}
            held = [p for p in cache.pos[row].tolist() if p >= 0]
            assert sorted(held) == sorted(expected)
            assert cache.length[row] == len(so_far)


def test_a_cache_for_few_tokens_is_small_and_refuses_more():
    model = small_gpt(block_size=1000)
    small = model.new_cache(2, 12)
    large = model.new_cache(2)
    # 12 and 1000 slots, and a spare one each
    assert small.k.nbytes * 1001 == large.k.nbytes * 13
    idx = some_ids(2, 12)
    assert close(cached_logits(model, small, idx, [5, 1]), uncached_logits(model, idx), 1e-4)
    with pytest.raises(ValueError, match='13 tokens do not fit in a cache for 12'):
        cached_logits(model, small, idx[:, :1], [1])


def test_sinks_that_are_never_reached_take_no_memory():
    model = small_gpt(block_size=10 ** 9, n_sink=10 ** 8)
    cache = model.new_cache(2, max_tokens=5)
    assert cache.n_slot <= 10
    idx = some_ids(2, 5)
    assert close(cached_logits(model, cache, idx, [2, 3]), uncached_logits(model, idx), 1e-4)


def test_a_cache_for_more_tokens_than_the_window_holds_the_window_and_never_ends():
    model = small_gpt(block_size=1000, window=5)
    assert model.new_cache(2, 12).k.nbytes == model.new_cache(2).k.nbytes
    idx = some_ids(2, 40)
    cached = cached_logits(model, model.new_cache(2, 12), idx, [3])
    assert close(cached, uncached_logits(model, idx), 1e-4)


# -----------------------------------------------------------------------------
# Precision

def test_the_cache_of_a_cpu_is_at_least_float32():
    assert small_gpt().new_cache(1).k.dtype == torch.float32
    assert small_gpt().double().new_cache(1).k.dtype == torch.float64
    assert small_gpt().bfloat16().new_cache(1).k.dtype == torch.float32
    with torch.autocast('cpu', torch.bfloat16):
        assert small_gpt().new_cache(1).k.dtype == torch.float32


def test_cached_logits_equal_uncached_logits_in_bfloat16():
    """Up to the rounding of bfloat16."""
    model = small_gpt(qk_norm=True)
    idx = some_ids(2, 16)
    with torch.autocast('cpu', torch.bfloat16):
        cached = cached_logits(model, model.new_cache(2), idx, [5, 1])
        assert close(cached, uncached_logits(model, idx), 0.1)
    model.bfloat16()
    cached = cached_logits(model, model.new_cache(2), idx, [5, 1])
    assert close(cached, uncached_logits(model, idx), 0.1)


def test_a_float64_model_has_float64_logits_with_a_cache():
    model = small_gpt(pos='sinusoidal', window=3, n_sink=2).double()
    idx = some_ids(1, 16)
    cached = cached_logits(model, model.new_cache(1), idx, [5, 1])
    assert close(cached, uncached_logits(model, idx), 1e-12)


def test_rope_is_exact_after_a_million_tokens():
    """Scores of queries at 1,000,000 + i and keys at 1,000,000 + j, against complex numbers in
    float64."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 50, 64).unbind()
    pos = torch.arange(50)[None] + 10 ** 6
    table = rope_table(pos, rope_frequencies(GPTConfig(n_head=1, n_embd=64)))
    scores = (rotate(q, table) @ rotate(k, table).mT)[0, 0].numpy()

    a = as_complex(q[0, 0].double().numpy())
    b = as_complex(k[0, 0].double().numpy())
    frequencies = 10000.0 ** (-np.arange(32) / 32)
    distance = np.arange(50)[:, None] - np.arange(50)
    rotation = np.exp(1j * distance[..., None] * frequencies)
    exact = np.einsum('id,jd,ijd->ij', a, b.conj(), rotation).real
    assert np.abs(scores - exact).max() < 1e-5 * np.abs(exact).max()


def test_a_model_has_the_same_hidden_states_after_a_million_tokens():
    model = small_gpt(n_kv_head=2)
    idx = some_ids(2, 16)
    pos = torch.arange(16).expand(2, 16)
    shifted = model.hidden(idx, pos=pos + 10 ** 6)
    assert close(shifted, model.hidden(idx, pos=pos), 1e-4)


# -----------------------------------------------------------------------------
# Limits

def test_learned_positions_cannot_pass_block_size():
    model = small_gpt(block_size=BLOCK, pos='learned')
    cache = model.new_cache(1)
    cached_logits(model, cache, some_ids(1, BLOCK), [BLOCK])
    message = f"{BLOCK + 1} tokens do not fit in block_size {BLOCK}, which pos 'learned'"
    with pytest.raises(ValueError, match=message):
        cached_logits(model, cache, some_ids(1, 1), [1])


def test_an_encoder_cannot_use_a_cache():
    model = small_gpt(causal=False)
    with pytest.raises(ValueError, match='causal False'):
        cached_logits(model, model.new_cache(1), some_ids(1, 3), [1])
