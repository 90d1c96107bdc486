"""
How fast tokens come: ours beside transformers' generate, in one run, as ratios (absolute times mean little).

    python tests/bench_sample.py                     all of it, about ten minutes on two cores
    python tests/bench_sample.py decode              a 135M Llama, batch 1 and 16, float32 and bfloat16
    python tests/bench_sample.py stream              time of the 10,000th token beside the 1,000th, window 256
    python tests/bench_sample.py window              training attention, window 256 and full, by length
"""
import os, subprocess, sys, time
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import torch
from configurator import peak_memory_mb
from model import BF16_CPU, GPT, GPTConfig, attention, local_attention

LLAMA_135M = dict(vocab_size=49152, block_size=2048, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_hidden=1536)

def seconds(*runs, repeat=3):
    """The least time of each, in turns, after one that does not count: noise only ever adds, and its moods last for seconds."""
    times = [[] for _ in runs]
    for _ in range(repeat + 1):
        for run, taken in zip(runs, times):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return [min(taken[1:]) for taken in times]

def decode(n_prompt=8):
    """Tokens a second of greedy decoding, prompt included, with each library's own cache; beside it what a plain
    read of memory reaches, for a token at batch 1 reads every weight once."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True)).eval()
    ours = GPT(GPTConfig(**LLAMA_135M)).eval()
    numbers = torch.ones(ours.n_params())
    print(f'a plain read of memory: {numbers.nbytes / seconds(numbers.sum)[0] / 1e9:.1f} GB/s', flush=True)
    for dtype in (torch.float32, torch.bfloat16):
        ours.to(dtype), theirs.to(dtype)
        weights = ours.n_params() * dtype.itemsize / 1e9
        for batch in (1, 16):
            n_new = 4 if (dtype, batch) == (torch.bfloat16, 16) and not BF16_CPU else 64  # emulated, theirs takes minutes
            idx = torch.randint(49152, (batch, n_prompt))
            t_ours, t_theirs = seconds(
                lambda: ours.generate(idx, n_new, temperature=0),
                lambda: theirs.generate(idx, max_new_tokens=n_new, min_new_tokens=n_new, do_sample=False,
                                        pad_token_id=0, attention_mask=torch.ones_like(idx)))
            print(f'{str(dtype)[6:]:>9}, batch {batch:>2}: ours {batch * n_new / t_ours:8.1f} tokens/s, transformers '
                  f'{batch * n_new / t_theirs:8.1f}, ratio {t_theirs / t_ours:.2f}, '
                  f'weights read at {weights * n_new / t_ours:.1f} and {weights * n_new / t_theirs:.1f} GB/s', flush=True)

def stream(n=200):
    """Milliseconds a token, the median of n around the 1,000th and the 10,000th of one endless text through the same small
    cache. Two streams reach the two places first, then take turns a token at a time: a machine's moods last for seconds."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=261, block_size=512, n_layer=4, n_embd=256, n_head=4, window=256, n_sink=4)).eval()
    def reached(place):
        tokens = model.stream(torch.zeros(1, 1, dtype=torch.long), 20_000)
        for _ in range(place - n // 2):
            next(tokens)
        return tokens
    streams, times = [reached(place) for place in (1_000, 10_000)], ([], [])
    for _ in range(n):
        for tokens, taken in zip(streams, times):
            start = time.perf_counter()
            next(tokens)
            taken.append(time.perf_counter() - start)
    early, late = (sorted(taken)[n // 2] * 1e3 for taken in times)
    print(f'streaming: token 1,000 {early:.3f} ms, token 10,000 {late:.3f} ms, ratio {late / early:.2f}', flush=True)

def attend(kind, T, w=256, nh=4, hs=64):
    """Forward and backward of one layer's attention over T tokens."""
    q, k, v = (torch.randn(1, nh, T, hs, requires_grad=True) for _ in range(3))
    if kind == 'window':
        y = local_attention(q, k, v, w, 0)
    elif kind == 'fused':
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        y = attention(q, k, v, torch.ones(T, T, dtype=torch.bool).tril())
    y.sum().backward()

def peak(kind, T):
    """The MB by which attend() raises the most memory this process has held."""
    attend(kind, 16)
    before = peak_memory_mb()
    attend(kind, int(T))
    print(peak_memory_mb() - before)

def window():
    """Time and memory of attention with a window of 256 beside full attention, fused and written out by hand."""
    print('attention over T tokens, window 256, 4 heads of 64, forward and backward')
    lengths, kinds = (1024, 2048, 4096, 8192), ('window', 'fused', 'by hand')
    memory = {(T, kind): float(subprocess.run([sys.executable, __file__, 'peak', kind, str(T)], capture_output=True, text=True,
                                              check=True).stdout) for T in lengths for kind in kinds}
    for T in lengths:  # the times last: a process is born with its parent's peak of memory
        ms = {kind: 1e3 * t for kind, t in zip(kinds, seconds(*(lambda kind=kind: attend(kind, T) for kind in kinds), repeat=2))}
        mb = {kind: max(1.0, memory[T, kind]) for kind in kinds}
        print(f'T {T:>5}', *(f'{kind} {ms[kind]:7.1f} ms {mb[kind]:5.0f} MB' for kind in ms),
              'full / window: ' + ', '.join(f'{kind} {ms[kind] / ms["window"]:.1f} x time, {mb[kind] / mb["window"]:.1f} x memory'
                                            for kind in ('fused', 'by hand')), sep=' | ', flush=True)

if __name__ == '__main__':
    if sys.argv[1:2] == ['peak']:
        peak(*sys.argv[2:])
    else:
        for part in sys.argv[1:] or ('decode', 'stream', 'window'):
            {'decode': decode, 'stream': stream, 'window': window}[part]()
