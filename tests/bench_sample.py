"""
Speed of generation and of windowed attention. Absolute times depend on the machine, so everything
is compared in one run and printed as ratios too.

    python tests/bench_sample.py             all parts, about ten minutes on two cores
    python tests/bench_sample.py decode      a 135M Llama next to transformers' generate, with
                                             batch 1 and 16, in float32 and bfloat16
    python tests/bench_sample.py stream      time of the 10,000th token next to the 1,000th,
                                             window 256
    python tests/bench_sample.py window      time and memory of training attention with a window of
                                             256 next to full attention, by length
"""
import os
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import torch

from configurator import has_fast_bfloat16, peak_memory_mb
from model import GPT, GPTConfig, attention, local_attention
from sample import fast_decoding

LLAMA_135M = dict(vocab_size=49152, block_size=2048, n_layer=30, n_head=9, n_kv_head=3, n_embd=576,
                  n_hidden=1536)


def shortest_times(*calls, repeats=3):
    """
    The shortest time of each call, in seconds. The calls take turns, because other work on the
    machine comes and goes within seconds. It can only add time, hence the shortest. The first round
    is a warm-up and is not counted.
    """
    times = [[] for _ in calls]
    for _ in range(1 + repeats):
        for call, measured in zip(calls, times):
            start = time.perf_counter()
            call()
            measured.append(time.perf_counter() - start)
    return [min(measured[1:]) for measured in times]


# -----------------------------------------------------------------------------
# Decoding


def their_model():
    """transformers' model of the sizes of LLAMA_135M."""
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048,
        tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


def bench_decode(n_prompt=8):
    """
    Print the tokens per second of greedy decoding, prompt included, with each library's own cache,
    and the speed at which the weights are read. At batch 1, every token reads every weight once,
    so a plain read of memory is the limit.
    """
    torch.manual_seed(0)
    theirs = their_model()
    ours = GPT(GPTConfig(**LLAMA_135M)).eval()
    n_params = ours.n_params()

    numbers = torch.ones(n_params)
    read_seconds, = shortest_times(numbers.sum)
    print(f'a plain read of memory: {numbers.nbytes / read_seconds / 1e9:.1f} GB/s', flush=True)

    for dtype in (torch.float32, torch.bfloat16):
        ours.to(dtype)
        theirs.to(dtype)
        gigabytes = n_params * dtype.itemsize / 1e9
        for batch in (1, 16):
            n_new = 64
            # Where bfloat16 is emulated, theirs takes minutes.
            if dtype == torch.bfloat16 and batch == 16 and not has_fast_bfloat16('cpu'):
                n_new = 4
            idx = torch.randint(49152, (batch, n_prompt))
            mask = torch.ones_like(idx)
            def generate_ours():
                with fast_decoding(ours, batch):
                    ours.generate(idx, n_new, temperature=0)
            our_seconds, their_seconds = shortest_times(
                generate_ours,
                lambda: theirs.generate(idx, max_new_tokens=n_new, min_new_tokens=n_new,
                                        do_sample=False, pad_token_id=0, attention_mask=mask))
            name = str(dtype).removeprefix('torch.')
            print(f'{name:>9}, batch {batch:>2}: '
                  f'ours {batch * n_new / our_seconds:8.1f} tokens/s, '
                  f'transformers {batch * n_new / their_seconds:8.1f}, '
                  f'ratio {their_seconds / our_seconds:.2f}, '
                  f'weights read at {gigabytes * n_new / our_seconds:.1f} '
                  f'and {gigabytes * n_new / their_seconds:.1f} GB/s', flush=True)


# -----------------------------------------------------------------------------
# Streaming


def stream_at(model, position, n):
    """A stream of tokens that has generated `position` - n / 2 tokens."""
    tokens = model.stream(torch.zeros(1, 1, dtype=torch.long), 20_000)
    for _ in range(position - n // 2):
        next(tokens)
    return tokens


def bench_stream(n=200):
    """
    Print the milliseconds per token around the 1,000th and the 10,000th token of an endless text
    with a small cache, medians of n tokens. Two streams first reach these places and then take
    turns token by token, because other work on the machine comes and goes within seconds.
    """
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=261, block_size=512, n_layer=4, n_embd=256, n_head=4, window=256,
                       n_sink=4)
    model = GPT(config).eval()
    streams = [stream_at(model, 1_000, n), stream_at(model, 10_000, n)]
    times = [[], []]
    with fast_decoding(model, 1):
        for _ in range(n):
            for tokens, measured in zip(streams, times):
                start = time.perf_counter()
                next(tokens)
                measured.append(time.perf_counter() - start)
    early = 1e3 * sorted(times[0])[n // 2]
    late = 1e3 * sorted(times[1])[n // 2]
    print(f'streaming: token 1,000 {early:.3f} ms, token 10,000 {late:.3f} ms, '
          f'ratio {late / early:.2f}', flush=True)


# -----------------------------------------------------------------------------
# Windowed attention


def attend(kind, T, window=256, nh=4, hs=64):
    """Forward and backward of one layer's attention over T tokens."""
    q = torch.randn(1, nh, T, hs, requires_grad=True)
    k = torch.randn(1, nh, T, hs, requires_grad=True)
    v = torch.randn(1, nh, T, hs, requires_grad=True)
    if kind == 'window':
        y = local_attention(q, k, v, window, 0)
    elif kind == 'fused':
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        y = attention(q, k, v, torch.ones(T, T, dtype=torch.bool).tril())
    y.sum().backward()


def print_added_memory(kind, T):
    """Print the MB by which attend() raises the peak memory of this process."""
    attend(kind, 16)
    before = peak_memory_mb()
    attend(kind, T)
    print(peak_memory_mb() - before)


def added_memory(kind, T):
    """The same, measured in a process of its own; at least 1 MB."""
    command = [sys.executable, __file__, 'memory', kind, str(T)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return max(1.0, float(done.stdout))


def bench_window():
    """Print time and memory of attention with a window of 256 and in full."""
    print('attention over T tokens, window 256, 4 heads of 64, forward and backward')
    lengths = (1024, 2048, 4096, 8192)
    kinds = ('window', 'fused', 'by hand')

    # Memory comes first: a process starts with the peak memory of its parent.
    memory = {}
    for T in lengths:
        for kind in kinds:
            memory[T, kind] = added_memory(kind, T)

    for T in lengths:
        calls = [lambda kind=kind: attend(kind, T) for kind in kinds]
        seconds = dict(zip(kinds, shortest_times(*calls, repeats=2)))
        cells = [f'T {T:>5}']
        for kind in kinds:
            cells.append(f'{kind} {1e3 * seconds[kind]:7.1f} ms {memory[T, kind]:5.0f} MB')
        for kind in ('fused', 'by hand'):
            time_ratio = seconds[kind] / seconds['window']
            memory_ratio = memory[T, kind] / memory[T, 'window']
            cells.append(f'{kind} / window: {time_ratio:.1f} x time, {memory_ratio:.1f} x memory')
        print(*cells, sep=' | ', flush=True)


PARTS = {'decode': bench_decode, 'stream': bench_stream, 'window': bench_window}

if __name__ == '__main__':
    if sys.argv[1:2] == ['memory']:
        print_added_memory(sys.argv[2], int(sys.argv[3]))
    else:
        for part in sys.argv[1:] or PARTS:
            PARTS[part]()
