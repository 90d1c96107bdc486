"""
The transformer, once, for every stage: from the attention of 'Attention Is All You Need' written
out by hand to GPT-2, Llama, Mistral, Qwen and Mixtral, which are settings of its flags.

Letters that trail the lines that reshape:
B batch   T time (tokens)   S keys (T without a cache)   C n_embd   V vocabulary
nh heads   nkv key/value heads   hs head size   E experts   N tokens of a batch, B * T
"""
import math
from collections import namedtuple
from dataclasses import dataclass
import torch
import torch.nn as nn
from torch.nn import functional as F

@dataclass
class GPTConfig:
    """The architecture. ValueError, naming both settings, where two of them cannot go together."""
    block_size: int = 256       # context length, in tokens
    vocab_size: int = 261       # 256 bytes and 5 special tokens
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 0          # key/value heads, each shared by n_head / n_kv_head query heads (GQA); 0 = n_head
    n_embd: int = 128
    head_dim: int = 0           # 0 = n_embd / n_head
    n_hidden: int = 0           # width of the MLP; 0 = 4 C, or 8/3 C for SwiGLU, which has a third matrix
    dropout: float = 0.0
    bias: bool = False          # in linear layers and LayerNorm
    qkv_bias: bool = False      # in the query, key and value projections alone, as Qwen2 has it
    norm: str = 'rmsnorm'       # 'layernorm' | 'rmsnorm'
    norm_eps: float = 1e-5
    pos: str = 'rope'           # 'learned' | 'sinusoidal' | 'rope'
    rope_base: float = 10000.0
    mlp: str = 'swiglu'         # 'gelu' | 'gelu_tanh' (GPT-2's approximation) | 'swiglu' | 'relu2'
    qk_norm: bool = False       # RMSNorm on queries and keys, a head at a time (after arXiv 2010.04245)
    window: int = 0             # a token sees the last `window` tokens, itself counted; 0 = all
    n_sink: int = 0             # the first tokens, which stay visible behind the window
    n_expert: int = 0           # experts a layer; 0 = dense
    n_expert_active: int = 2    # experts a token is sent to
    n_shared_expert: int = 0    # experts that see every token, beside those
    moe_balance: str = 'aux'    # what keeps all experts in use: 'aux' (a loss) | 'bias' (of the choice) | 'none'
    moe_every: int = 1          # 1 = every layer has experts, 2 = every other layer stays dense
    tie_weights: bool = True    # the output head is the token embedding (arXiv 1608.05859)
    causal: bool = True         # False = a bidirectional encoder
    attn: str = 'auto'          # 'auto' | 'sdpa' (PyTorch's fused attention) | 'manual' (written out by hand)

    def __post_init__(self):
        for name, allowed in (('norm', NORM), ('pos', ('learned', 'sinusoidal', 'rope')), ('mlp', ACT),
                              ('attn', ('auto', 'sdpa', 'manual')), ('moe_balance', ('aux', 'bias', 'none'))):
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name} must be one of {", ".join(allowed)}; got {getattr(self, name)!r}')
        for least, names in ((1, ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'moe_every')),
                             (0, ('n_kv_head', 'head_dim', 'n_hidden', 'window', 'n_sink', 'n_expert'))):
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(f'{name} must be at least {least}; got {getattr(self, name)}')
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f'n_embd {self.n_embd} must be a multiple of n_head {self.n_head} (or set head_dim)')
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_hidden = self.n_hidden or (4 * self.n_embd if self.mlp != 'swiglu' else  # the same parameters
                                          8 * max(1, round(8 * self.n_embd / 3 / 8)))
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}')
        if self.pos == 'rope' and self.head_dim % 2:
            raise ValueError(f"pos 'rope' turns pairs: head_dim {self.head_dim} must be even")
        if self.pos == 'sinusoidal' and self.n_embd % 2:
            raise ValueError(f"pos 'sinusoidal' makes pairs: n_embd {self.n_embd} must be even")
        if max(1, self.window) + self.n_sink > self.block_size:
            raise ValueError(f'window {self.window} + n_sink {self.n_sink} must fit in block_size {self.block_size}, '
                             'and a token must see itself')
        if not self.causal and (self.window or self.n_sink):
            raise ValueError(f'causal False sees everything: window {self.window} and n_sink {self.n_sink} must be 0')
        if self.n_expert and not 1 <= self.n_expert_active <= self.n_expert:
            raise ValueError(f'n_expert_active {self.n_expert_active} must be from 1 to n_expert {self.n_expert}')
        if self.n_shared_expert and not 0 < self.n_shared_expert * self.n_expert:
            raise ValueError(f'n_shared_expert {self.n_shared_expert} must be 0 or go with n_expert {self.n_expert}')
        if self.n_expert and self.moe_every > self.n_layer:
            raise ValueError(f'moe_every {self.moe_every} must be from 1 to n_layer {self.n_layer}')

NORM = {'layernorm': lambda size, c: nn.LayerNorm(size, c.norm_eps, bias=c.bias),  # arXiv 1607.06450
        'rmsnorm': lambda size, c: nn.RMSNorm(size, c.norm_eps)}  # arXiv 1910.07467
ACT = {'gelu': F.gelu, 'gelu_tanh': lambda x: F.gelu(x, approximate='tanh'), 'relu2': lambda x: F.relu(x).square(), 'swiglu': F.silu}

# whether this CPU multiplies in bfloat16; others emulate it, many times slower
BF16_CPU = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()

class Linear(nn.Linear):
    """nn.Linear, for which `prepare` finds a faster way while a CPU generates."""
    fast = None

    def prepare(self, n):
        """Until n = 0, for n tokens at a time and this weight: a copy of it in the blocks that oneDNN reads, into which it is
        else brought every time, in float32 where bfloat16 is emulated; or, for a single token, all cores instead of one."""
        w, b, self.fast = self.weight.detach(), self.bias, None
        cores = math.gcd(torch.get_num_threads(), self.out_features)  # that can share the rows of w evenly
        dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else w.dtype
        if not w.is_cpu or n * w.numel() < 2 ** 18 or dtype not in (torch.float32, torch.bfloat16):  # small ones gain nothing
            return
        if torch.backends.mkldnn.is_available() and (n > 2 or BF16_CPU and dtype == torch.bfloat16):
            kept = dtype if BF16_CPU else torch.float32
            w, b = torch.ops.mkldnn._reorder_linear_weight(w.to(kept)), b if b is None else b.detach().to(kept)
            self.fast = lambda x: torch.ops.mkldnn._linear_pointwise(x.to(kept), w, b, 'none', [], '').to(x.dtype)
        elif cores > 1 and w.dtype == torch.float32:
            rows = w.view(cores, -1, self.in_features)
            self.fast = lambda x: F.linear(x, w, b) if x.numel() != w.size(1) else torch.bmm(
                rows, x.reshape(1, -1).T.expand(cores, -1, -1)).view(*x.shape[:-1], -1) + (0 if b is None else b)

    def forward(self, x):
        return super().forward(x) if self.fast is None or torch.is_grad_enabled() else self.fast(x)

# -----------------------------------------------------------------------------
# Positions

def sinusoidal(pos, n_embd):
    """Position encodings of arXiv 1706.03762, section 3.5: sin(pos / 10000^(2i/C)) in the even and the
    cosine of it in the odd channels. pos (..., T) -> (..., T, C)."""
    rate = 10000.0 ** (-torch.arange(0, n_embd, 2, device=pos.device) / n_embd)
    angle = pos[..., None] * rate
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)

def rope_table(pos, head_dim, base):
    """Cosine and sine of pos / base^(2i/hs), each (..., 1, T, hs), for both halves of a head, the sines of the first below 0.
    In float64 where the device has it: a float32 angle is off by a hundredth of a turn after a million tokens."""
    exact = torch.float32 if pos.device.type == 'mps' else torch.float64
    rate = base ** (-torch.arange(0, head_dim, 2, device=pos.device, dtype=exact) / head_dim)
    angle = (pos[..., None] * torch.cat((-rate, rate))).unsqueeze(-3)  # of an angle below 0 the sine changes its sign
    return angle.cos().float(), angle.sin().float()

def rotate(x, rope):
    """RoPE (arXiv 2104.09864; its pairs are neighbours, Llama's i and i + hs/2): turn a pair (a, b) by its position's angle to
    (a cos - b sin, b cos + a sin), so that a score depends on the distance of the two positions alone. x (B, heads, T, hs)."""
    (cos, sin), wide = rope, x.float()
    return torch.addcmul(wide * cos, wide.roll(x.size(-1) // 2, dims=-1), sin).to(x.dtype)

def visible(q_pos, k_pos, window, n_sink, causal=True):
    """The one rule of who sees whom, from positions alone: the past, no further back than the window
    (arXiv 2310.06825) or among the sinks (arXiv 2309.17453); everyone, for an encoder; never padding,
    whose position is -1. q_pos (..., T), k_pos (..., S) -> bool (..., T, S)."""
    q, k = q_pos[..., :, None], k_pos[..., None, :]
    if not causal:
        return (k >= 0) | (q < 0)
    seen = (k >= 0) & (k <= q) & ((q - k < window) | (k < n_sink))
    return seen | (q < 0)  # a padded query's output is never read, but a softmax over nothing would be NaN

# -----------------------------------------------------------------------------
# Attention and its cache

class KVCache:
    """Keys and values of the tokens seen so far, for every layer, pre-allocated, with the absolute position that each slot holds
    (-1 = empty). Sinks keep their slots, the rest is a ring: slot = n_sink + (pos - n_sink) % window. The full cache is the case
    window = block_size. Rows may be of different lengths; the mask reads positions, so the order of slots never matters."""
    def __init__(self, config, window, batch_size, dtype, device):
        c, self.n_sink, self.window = config, config.n_sink, window
        self.n_slot = window + c.n_sink
        shape = (c.n_layer, batch_size, c.n_kv_head, self.n_slot + 1, c.head_dim)  # the last slot takes what
        self.k = torch.zeros(shape, dtype=dtype, device=device)                    # need not be kept
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.pos = torch.full((batch_size, self.n_slot + 1), -1, device=device)
        self.length = torch.zeros(batch_size, dtype=torch.long, device=device)     # next position of each row
        self.seen = 0                                                              # tokens put in, padding too
        self.rows = torch.arange(batch_size, device=device)[:, None]

    def extend(self, pos):
        """Make room for tokens at positions pos (B, T). Returns the positions (B, S) of the keys that
        `update` will hand to attention: one token reads the cache it has just been written to; the
        tokens of a chunk must also see what the chunk's own end overwrites, so they read both."""
        before = self.pos[:, :min(self.seen, self.n_slot)].clone()
        self.length = torch.maximum(self.length, pos.amax(1) + 1)
        slot = torch.where(pos < self.n_sink, pos, self.n_sink + (pos - self.n_sink) % self.window)
        overtaken = (pos >= self.n_sink) & (pos < self.length[:, None] - self.window)
        self.slot = slot.masked_fill(overtaken | (pos < 0), self.n_slot)
        self.pos[self.rows, self.slot] = pos
        self.pos[:, self.n_slot] = -1
        self.old = 0 if pos.size(1) == 1 else before.size(1)
        self.single = pos.size(1) == 1
        self.seen += pos.size(1)
        return self.pos[:, :min(self.seen, self.n_slot)] if self.single else torch.cat((before, pos), dim=1)

    def update(self, layer, k, v):
        """Store a layer's new keys and values (B, nkv, T, hs); returns those to attend to (B, nkv, S, hs)."""
        cached, pair = (self.k[layer], self.v[layer]), (k, v)
        if self.old:
            pair = tuple(torch.cat((c[:, :, :self.old], new), dim=2) for c, new in zip(cached, pair))
        for c, new in zip(cached, (k, v)):
            c[self.rows, :, self.slot] = new.transpose(1, 2).to(c.dtype)
        return tuple(c[:, :, :min(self.seen, self.n_slot)] for c in cached) if self.single else pair

def attention(q, k, v, mask, dropout=0.0):
    """softmax(q k^T / sqrt(hs)) v (arXiv 1706.03762, equation 1), written out by hand. q (B, nh, T, hs),
    k and v (B, nkv, S, hs), mask bool, broadcast to (B, T, S), True = may look. With nkv < nh the query
    heads share keys in groups (arXiv 2305.13245), folded into the time of one head. -> (B, nh, T, hs)"""
    B, nh, T, hs = q.shape
    nkv, S = k.shape[1:3]
    q = q.reshape(B, nkv, nh // nkv * T, hs)                          # (B, nkv, G*T, hs)
    scores = (q @ k.transpose(-2, -1)) * hs ** -0.5                   # (B, nkv, G*T, S)
    scores = scores.view(B, nkv, nh // nkv, T, S)
    mask = mask if mask.dim() == 2 else mask[:, None, None]           # (B, 1, 1, T, S)
    weights = F.softmax(scores.masked_fill(~mask, -math.inf), dim=-1)
    weights = F.dropout(weights, dropout).view(B, nkv, -1, S)
    return (weights @ v).view(B, nh, T, v.size(-1))

def local_attention(q, k, v, window, n_sink, dropout=0.0):
    """Sliding-window attention at the cost of the window, T * window instead of T²: the tokens are cut
    into blocks as long as the window, and a block looks at itself, the block before it and the sinks.
    Equal to attention() under the mask of the window. q (B, nh, T, hs), k and v (B, nkv, T, hs)."""
    B, nh, T, hs = q.shape
    W, n, n_sink = window, -(-T // window), min(n_sink, T)            # n blocks, the last one padded
    group = nh // k.size(1)
    pos = F.pad(torch.arange(T, device=q.device), (0, n * W - T), value=-1).view(n, W)
    before = lambda x, fill: torch.cat((torch.full_like(x[:1], fill), x[:-1]))
    k_pos = torch.cat((before(pos, -1), pos), dim=1)                  # (n, 2W)
    k_pos = k_pos.masked_fill(k_pos < n_sink, -1)                     # sinks have columns of their own
    k_pos = torch.cat((k_pos, torch.arange(n_sink, device=q.device).expand(n, -1)), dim=1)
    def blocks(x):                                                    # (B, h, T, hs) -> (n, B, h, W, hs)
        return F.pad(x, (0, 0, 0, n * W - T)).unflatten(2, (n, W)).movedim(2, 0)
    def around(x):                                                    # keys that the blocks see
        own, sink = blocks(x), x[:, :, :n_sink]
        return torch.cat((before(own, 0), own, sink.expand(n, *sink.shape)), dim=3).flatten(0, 1)
    mask = visible(pos, k_pos, window, n_sink).repeat_interleave(B, 0)  # (n*B, W, 2W + n_sink)
    q, k, v = blocks(q).flatten(0, 1), around(k), around(v)
    y = F.scaled_dot_product_attention(q, k, v, mask[:, None], dropout, enable_gqa=group > 1)
    return y.unflatten(0, (n, B)).movedim(0, 2).flatten(2, 3)[:, :, :T]  # (B, nh, T, hs)

# What the layers of one forward pass share: rotations of queries and keys, the rotation in which queries see the sinks when
# it differs, who sees whom (None = PyTorch's own is_causal, or no mask, says it), which tokens are no padding (None = all).
Shared = namedtuple('Shared', 'rope sink_rope is_sink mask local fused real')

class Attention(nn.Module):
    """Multi-head self-attention, n_head=1 being the single head. (B, T, C) -> (B, T, C)"""
    def __init__(self, config, layer):
        super().__init__()
        c = self.config = config
        self.layer = layer
        self.c_attn = Linear(c.n_embd, (c.n_head + 2 * c.n_kv_head) * c.head_dim, bias=c.bias or c.qkv_bias)
        self.c_proj = Linear(c.n_head * c.head_dim, c.n_embd, bias=c.bias)
        self.resid_dropout = nn.Dropout(c.dropout)
        if c.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(c.head_dim, c.norm_eps) for _ in range(2))

    def forward(self, x, shared, cache=None):
        c, (B, T, _) = self.config, x.shape
        qk, v = self.c_attn(x).unflatten(-1, (-1, c.head_dim)).transpose(1, 2).split(  # (B, heads, T, hs)
            [c.n_head + c.n_kv_head, c.n_kv_head], dim=1)
        if c.qk_norm:
            qk = torch.cat([norm(t.to(norm.weight.dtype)).to(v.dtype) for norm, t in zip(
                (self.q_norm, self.k_norm), qk.split([c.n_head, c.n_kv_head], dim=1))], dim=1)
        turned = rotate(qk, shared.rope) if shared.rope else qk       # both at once: fewer, larger operations
        q, k = turned.split([c.n_head, c.n_kv_head], dim=1)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
            q = q.to(k.dtype)
        if shared.sink_rope:  # the scores of sinks come from the second half, all others from the first
            q = torch.cat((q, rotate(qk[:, :c.n_head], shared.sink_rope)), dim=-1) * 2 ** 0.5  # hs doubles under the root
            k = torch.cat((k.masked_fill(shared.is_sink, 0), k.masked_fill(~shared.is_sink, 0)), dim=-1)
        dropout = c.dropout if self.training else 0.0
        if shared.local:
            y = local_attention(q, k, v, c.window, c.n_sink, dropout)
        elif shared.fused:
            mask = shared.mask if shared.mask is None or shared.mask.dim() == 2 else shared.mask[:, None]
            if T == 1:  # the queries that share a key stand as if they were tokens, which a CPU is faster at
                q = q.reshape(B, c.n_kv_head, -1, q.size(-1))
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None and c.causal,
                                               enable_gqa=q.size(1) != c.n_kv_head).reshape(B, c.n_head, T, -1)
        else:
            y = attention(q, k, v, shared.mask, dropout)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2).to(x.dtype)))  # (B, T, nh*hs) -> (B, T, C)

# -----------------------------------------------------------------------------
# Feed-forward layers

class MLP(nn.Module):
    """Widen, bend, narrow: GELU (arXiv 1606.08415) as in GPT-2, or the squared ReLU of arXiv 2109.08668."""
    def __init__(self, config):
        super().__init__()
        self.act = ACT[config.mlp]
        self.c_fc = Linear(config.n_embd, config.n_hidden, bias=config.bias)
        self.c_proj = Linear(config.n_hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, real=None):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))

class SwiGLU(nn.Module):
    """silu(x W) * (x V), then narrow (arXiv 2002.05202, equation 6). W and V stand in one matrix."""
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 2 * config.n_hidden, bias=config.bias)
        self.c_proj = Linear(config.n_hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, real=None):
        gate, up = self.c_fc(x).chunk(2, dim=-1)
        return self.dropout(self.c_proj(F.silu(gate) * up))

class MoE(nn.Module):
    """Mixture of experts in the place of an MLP: a router sends each token to its n_expert_active best experts, which
    are mixed by the softmax over those (Mixtral, arXiv 2401.04088). Over a single one it would be 1, and teach the
    router nothing: there it is the softmax over all (Switch, arXiv 2101.03961). n_shared_expert more see every token
    (DeepSeekMoE, arXiv 2401.06066). No token is dropped. The balancing loss, if asked for, is 1 when all is even."""
    def __init__(self, config):
        super().__init__()
        c, self.n_active, self.has_aux = config, config.n_expert_active, config.moe_balance == 'aux'
        self.router = nn.Linear(c.n_embd, c.n_expert, bias=False)
        self.experts = nn.ModuleList(FFN[c.mlp](c) for _ in range(c.n_expert))
        self.shared = nn.ModuleList(FFN[c.mlp](c) for _ in range(c.n_shared_expert))
        self.register_buffer('bias', torch.zeros(c.n_expert) if c.moe_balance == 'bias' else None)
        self.aux = self.z = None  # losses of the last forward pass
        self.tally = 0.0          # training tokens of each expert and the sum of their entropies, until GPT.balance

    def __getstate__(self):  # copy.deepcopy refuses tensors of a graph
        return self.__dict__ | {'aux': None, 'z': None}

    def forward(self, x, real=None):
        """(..., C) -> (..., C). Padding, where real (...) is False, counts in no loss and no statistic."""
        tokens, E = x.flatten(0, -2), len(self.experts)               # (N, C)
        logits = self.router(tokens).float()                          # (N, E)
        probs = logits.softmax(dim=-1)
        # the bias has a say in who is chosen, none in how much the chosen count (arXiv 2408.15664)
        chosen = (logits if self.bias is None else probs + self.bias).topk(self.n_active).indices  # (N, active)
        gate = probs.gather(1, chosen) if self.n_active == 1 else logits.gather(1, chosen).softmax(dim=-1)
        order = chosen.flatten().argsort(stable=True)                 # pairs of token and expert, by expert
        token, sizes = order // self.n_active, chosen.flatten().bincount(minlength=E).tolist()
        y = torch.cat([expert(part) for expert, part in zip(self.experts, tokens.index_select(0, token).split(sizes))])
        out = torch.zeros_like(tokens).index_add(0, token, (y * gate.flatten()[order, None]).to(x.dtype))
        if real is not None:
            logits, probs, chosen = (t[real.flatten()] for t in (logits, probs, chosen))
        load = F.one_hot(chosen, E).sum((0, 1)).float()               # (E,)
        if self.training:
            self.tally = self.tally + torch.cat((load, torch.special.entr(probs.detach()).sum()[None]))
        self.aux = E * (load / load.sum() * probs.mean(0)).sum() if self.has_aux else None  # 2101.03961, equation 4
        self.z = logits.logsumexp(dim=-1).square().mean()             # arXiv 2202.08906, equation 5
        return sum((expert(tokens) for expert in self.shared), out).view_as(x)

FFN = {'gelu': MLP, 'gelu_tanh': MLP, 'relu2': MLP, 'swiglu': SwiGLU}

class Block(nn.Module):
    """Pre-norm residual block (arXiv 2002.04745): x + attention(norm(x)), then x + MLP(norm(x))."""
    def __init__(self, config, layer):
        super().__init__()
        sparse = config.n_expert and (layer + 1) % config.moe_every == 0
        self.ln_1 = NORM[config.norm](config.n_embd, config)
        self.attn = Attention(config, layer)
        self.ln_2 = NORM[config.norm](config.n_embd, config)
        self.mlp = MoE(config) if sparse else FFN[config.mlp](config)

    def forward(self, x, shared, cache=None, read=...):
        x = (x + self.attn(self.ln_1(x), shared, cache))[read]
        return x + self.mlp(self.ln_2(x), None if shared.real is None else shared.real[read])

# -----------------------------------------------------------------------------
# The model

class GPT(nn.Module):
    """A decoder (or, with causal=False, an encoder) over token ids; an id of -1 is padding."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.window = c.window or c.block_size - c.n_sink  # full attention: all that a block holds
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        if c.pos == 'learned':
            self.wpe = nn.Embedding(c.block_size, c.n_embd)
        self.drop = nn.Dropout(c.dropout)
        self.h = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
        self.moes = {layer: block.mlp for layer, block in enumerate(self.h) if isinstance(block.mlp, MoE)}
        self.ln_f = NORM[c.norm](c.n_embd, c)
        self.lm_head = Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie_weights:
            self.lm_head.weight = self.wte.weight
        # initialisation: N(0, 0.02), zero biases, and as GPT-2 does, what is added to the residual stream
        # scaled by 1/sqrt(number of additions); norms start at one
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02 / (2 * c.n_layer) ** 0.5 if name.endswith('c_proj.weight') else 0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def n_params(self, active=False):
        """Parameters, the tied head counted once; active=True: of those a token goes through."""
        idle = [(len(moe.experts) - moe.n_active) * sum(p.numel() for p in moe.experts[0].parameters())
                for moe in self.moes.values()]
        return sum(p.numel() for p in self.parameters()) - sum(idle) * active

    def flops_per_token(self, T):
        """Floating-point operations to train on one token in a context of T, forward and backward
        (arXiv 2204.02311, appendix B): 6 a matrix weight, and 12 nh hs a layer and visible key."""
        c = self.config
        lookup = 0 if c.tie_weights else self.wte.weight.numel()
        lookup += self.wpe.weight.numel() if c.pos == 'learned' else 0
        seen = min(T, self.window + c.n_sink)
        return 6 * (self.n_params(active=True) - lookup) + 12 * c.n_layer * c.n_head * c.head_dim * seen

    @torch.compiler.disable  # or the compiler works out angles and mask anew for every head, in every layer
    def share(self, idx, cache, pos):
        """The positions (B or 1, T) of a forward pass, and what follows from them for all its layers."""
        c, T = self.config, idx.size(1)
        plain, real = cache is None and pos is None, None if pos is None else pos >= 0
        if pos is None:
            pos = torch.arange(T, device=idx.device)[None]            # (1, T)
            pos = pos if cache is None else cache.length[:, None] + pos
        end = T if cache is None else cache.seen + T                  # no query stands at `end` or past it
        if c.pos == 'learned' and end > c.block_size:
            raise ValueError(f"{end} tokens do not fit in block_size {c.block_size}, which pos 'learned' cannot pass")
        if cache is not None and (not c.causal or end > cache.window < self.window):
            raise ValueError(f'{end} tokens do not fit in a cache for {cache.window}' if c.causal else
                             'causal False sees all tokens at once: it cannot go on from a cache')
        k_pos = pos if cache is None else cache.extend(pos)
        # the fused backward is the faster one but for bfloat16 on CPUs, where it takes several times as long
        slow = idx.device.type == 'cpu' and torch.is_grad_enabled() and torch.is_autocast_enabled('cpu')
        fused = c.attn == 'sdpa' or c.attn == 'auto' and not slow
        slides = c.pos == 'rope' and c.n_sink and end > c.block_size
        local = plain and c.causal and c.window and T > 2 * c.window and c.attn != 'manual'
        mask = None
        if not local and not (fused and plain and (T <= self.window + c.n_sink or not c.causal)):
            mask = visible(pos, k_pos, self.window, c.n_sink, c.causal)[0 if plain else ...]  # (T, T) or (B, T, S)
        rope = rope_table(pos, c.head_dim, c.rope_base) if c.pos == 'rope' else None
        sink_rope = rope_table(pos.clamp(max=c.block_size - 1), c.head_dim, c.rope_base) if slides else None
        is_sink = (k_pos < c.n_sink)[:, None, :, None] if slides else None
        return pos, Shared(rope, sink_rope, is_sink, mask, local, fused, real)

    def hidden(self, idx, cache=None, pos=None, read=...):
        """The trunk: idx (B, T) -> hidden states (B, T, C) after the final norm, for heads to read; or (N, C) at the N tokens
        that `read` says, an index of (B, T) like mask.nonzero(as_tuple=True), which spares the others the last MLP.

        pos (B, T), where given, is each token's position, -1 = padding, which nobody sees. Without it
        tokens stand at 0..T-1, or go on from the cache. Up to block_size positions are absolute; past it
        a query sees at most the window and the sinks, and these slide along (arXiv 2309.17453), so that
        no distance is met that was not trained on. ValueError past block_size with learned positions."""
        c = self.config
        idx = idx if pos is None else idx.clamp(min=0)
        pos, shared = self.share(idx, cache, pos)
        x = self.wte(idx)
        if c.pos == 'learned':
            x = x + self.wpe(pos.clamp(min=0))
        elif c.pos == 'sinusoidal':  # the embedding is scaled up to the encoding's size (1706.03762, section 3.4)
            x = x * c.n_embd ** 0.5 + sinusoidal(pos, c.n_embd).to(x.dtype)
        x = self.drop(x)
        for block in self.h:
            x = block(x, shared, cache, read if block is self.h[-1] else ...)
        return self.ln_f(x)

    def forward(self, idx, targets=None, cache=None, read=...):
        """idx (B, T), targets (B, T) or None -> logits (B, T, V) at every position, or (N, V) where read says (see
        hidden), and the mean cross-entropy in nats a token over the targets that are not -1 (None without; not with read)."""
        logits = self.lm_head(self.hidden(idx, cache, read=read))
        return logits, None if targets is None else F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    def aux_loss(self, kind='aux'):
        """The balancing loss of the last forward pass, the mean over its mixture-of-experts layers; 0 if there are
        none, or if moe_balance is not 'aux'. kind 'z': the routers' z-loss, which keeps their logits small."""
        losses = [getattr(moe, kind) for moe in self.moes.values() if getattr(moe, kind) is not None]
        return torch.stack(losses).mean() if losses else torch.zeros((), device=self.wte.weight.device)

    @torch.no_grad()
    def balance(self, bias_rate):
        """Once a step, after its micro-batches: by moe_balance 'bias', experts that had more than their share of
        its tokens, on all ranks, become less likely to be chosen, others more. Returns what to log, as tensors."""
        tally = torch.stack([moe.tally for moe in self.moes.values()])  # (layers, E + 1)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(tally)
        load, entropy = tally[:, :-1], tally[:, -1].mean() * self.config.n_expert_active / tally[0, :-1].sum()
        for moe, tokens in zip(self.moes.values(), load):
            moe.tally = 0.0
            if moe.bias is not None:
                moe.bias += bias_rate * (tokens.mean() - tokens).sign()
        share = load / load.sum(1, keepdim=True)
        return {'moe_imbalance': share.max() * load.size(1), 'moe_entropy': entropy,  # the worst; a token's, in nats
                **{f'moe/layer_{n}/expert_{e}': s for n, row in zip(self.moes, share) for e, s in enumerate(row)}}

    def optimizers(self, optimizer, learning_rate, weight_decay, betas, muon_lr=0.02, muon_momentum=0.95):
        """The optimizers that together train all parameters: ['adamw'], or with 'muon' Muon for the matrices
        of the blocks and AdamW for the rest. Matrices decay, biases and norms do not. A group's lr is the
        schedule's times its `lr_scale`, so that one schedule serves both."""
        if optimizer not in ('adamw', 'muon'):
            raise ValueError(f"optimizer must be 'adamw' or 'muon'; got {optimizer!r}")
        params = {n: p for n, p in self.named_parameters() if p.requires_grad}
        muon = [n for n, p in params.items() if optimizer == 'muon' and p.dim() == 2 and n.startswith('h.')
                and 'router' not in n]
        rest = [p for n, p in params.items() if n not in muon]
        groups = [{'params': [p for p in rest if p.dim() > 1], 'weight_decay': weight_decay},
                  {'params': [p for p in rest if p.dim() < 2], 'weight_decay': 0.0}]
        made = [torch.optim.AdamW(groups, learning_rate, betas, fused=self.wte.weight.device.type in ('cuda', 'cpu'))]
        if muon:
            made.append(Muon([params[n] for n in muon], lr=muon_lr, momentum=muon_momentum, weight_decay=weight_decay))
        for group in (g for o in made for g in o.param_groups):
            group['lr_scale'] = group['lr'] / learning_rate if learning_rate else 1.0
        return made

    @staticmethod
    def from_pretrained(name_or_dir, dtype=None, **flags):
        """The model in a Hugging Face folder or of a name on its hub: see data/pretrained.py."""
        from data.pretrained import load_pretrained
        return load_pretrained(name_or_dir, dtype, **flags)

    def save_pretrained(self, folder, tokenizer=None):
        """Write a folder that AutoModelForCausalLM.from_pretrained (and AutoTokenizer's) opens."""
        from data.pretrained import save_pretrained
        save_pretrained(self, folder, tokenizer)

    # ----- generation

    def new_cache(self, batch_size, max_tokens=None):
        """An empty KVCache for batch_size rows; no larger than max_tokens need, where that is known."""
        window = self.window if max_tokens is None else max(1, min(self.window, max_tokens))
        dtype, device = self.wte.weight.dtype, self.wte.weight.device
        dtype = torch.promote_types(dtype, torch.float32) if device.type == 'cpu' else torch.get_autocast_dtype(
            device.type) if torch.is_autocast_enabled(device.type) else dtype  # a CPU's attention is faster in float32
        return KVCache(self.config, window, batch_size, dtype, device)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop=(), use_cache=True, generator=None):
        """Yield the next ids (B,) one step at a time; -1 for a row that has ended. See generate."""
        c, (B, T) = self.config, idx.shape
        training, stop = self.training, torch.tensor(list(stop), dtype=torch.long, device=idx.device)
        ended = torch.zeros(B, dtype=torch.bool, device=idx.device)
        if not c.causal:
            raise ValueError('causal False sees all tokens at once: it cannot generate')
        if T == 0 or (idx[:, -1] < 0).any():
            raise ValueError('generation needs a token at the end of every row; padding (-1) stands on the left')
        if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
            raise ValueError(f'temperature {temperature} and top_k {top_k} must be at least 0, top_p {top_p} in (0, 1]')
        if c.pos == 'learned':
            idx = idx[:, -c.block_size:]
        ragged = bool((idx < 0).any())
        cache = self.new_cache(B, T + max_new_tokens) if use_cache else None
        fresh = idx                                                   # what the cache has not seen
        try:
            self.eval().apply(lambda layer: isinstance(layer, Linear) and layer.prepare(B))
            for _ in range(max_new_tokens):
                if c.pos == 'learned' and idx.size(1) > c.block_size:  # no streaming: the last block, anew
                    idx = fresh = idx[:, -c.block_size:]
                    cache = None
                fresh = idx if cache is None else fresh
                for chunk in fresh.split(c.block_size if cache is not None else fresh.size(1), dim=1):
                    pos = None
                    if ragged:
                        real = chunk >= 0
                        start = 0 if cache is None else cache.length[:, None]
                        pos = torch.where(real, start + real.cumsum(1) - 1, -1)
                    with torch.autocast('cpu', enabled=False):        # prepared layers know it; the rest is faster without
                        h = self.hidden(chunk, cache, pos, read=(slice(None), -1))  # (B, C)
                logits = self.lm_head(h).float()
                fresh = logits.argmax(-1, keepdim=True) if temperature == 0 else torch.multinomial(
                    sampling_probs(logits, temperature, top_k, top_p), 1, generator=generator)
                fresh = fresh.masked_fill(ended[:, None], -1)
                ragged = ragged or bool(ended.any())
                idx = torch.cat((idx, fresh), dim=1) if cache is None or c.pos == 'learned' else idx
                yield fresh[:, 0]
                ended = ended | torch.isin(fresh[:, 0], stop)
                if ended.all():
                    break
        finally:
            self.train(training).apply(lambda layer: isinstance(layer, Linear) and layer.prepare(0))

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop=(), use_cache=True, generator=None):
        """Continue idx (B, T) by sampling -> (B, T + n), n <= max_new_tokens.

        temperature 0 is greedy; top_k keeps the k likeliest tokens and their equals (0 = all); top_p the fewest whose probability
        reaches p (arXiv 1904.09751). A row ends with the first token that is in `stop`; after it stands -1. Prompts of different
        lengths are padded on the left with -1. Any length streams past block_size, but for learned positions, which then see the
        last block only. The model is left in the mode it was found in; the same generator state gives the same tokens."""
        steps = list(self.stream(idx, max_new_tokens, temperature, top_k, top_p, stop, use_cache, generator))
        return torch.cat((idx, torch.stack(steps, dim=1)), dim=1) if steps else idx

def sampling_probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution (B, V) that a token is drawn from, of logits (B, V)."""
    probs = F.softmax(logits / (temperature or 1.0), dim=-1)
    if 0 < top_k < probs.size(-1):
        probs = probs.masked_fill(probs < probs.topk(top_k).values[:, -1:], 0.0)
    if top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p * ordered.sum(-1, keepdim=True)] = 0.0  # the token that
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)                         # crosses p is kept
    return probs / probs.sum(-1, keepdim=True)

class ScalarHead(nn.Module):
    """One number a hidden state: the reward of a sequence or the value of each token. Starts as N(0, std)."""
    def __init__(self, n_embd, std=0.0):
        super().__init__()
        self.proj = nn.Linear(n_embd, 1)
        nn.init.normal_(self.proj.weight, std=std)
        nn.init.zeros_(self.proj.bias)

    def forward(self, h):
        """h (..., C) -> a value for each (...)."""
        return self.proj(h).squeeze(-1)

    def score(self, h, read):
        """One score a row (B,): the mean over the tokens where read (B, T) is True, whose hidden states are h (N, C)."""
        values = self(h)
        return values.new_zeros(read.shape).masked_scatter(read, values).sum(1) / read.sum(1)

class RewardModel(nn.Module):
    """A trunk and a ScalarHead: the score of a whole conversation (arXiv 2203.02155, section 3.5). `shift` and
    `scale`, set after training, bring the scores of the policy's answers to mean 0 and variance 1."""
    def __init__(self, trunk):
        super().__init__()
        self.trunk, self.head = trunk, ScalarHead(trunk.config.n_embd, std=(trunk.config.n_embd + 1) ** -0.5)
        trunk.lm_head.requires_grad_(trunk.config.tie_weights)        # a head of its own stays as it was: only restoring reads it
        self.register_buffer('shift', torch.zeros(()))
        self.register_buffer('scale', torch.ones(()))

    def forward(self, idx, mask=None, targets=None):
        """idx (B, T), -1 = padding, on any side; mask (B, T), 1 on the answer (None = on all), of which an encoder reads the
        mean, a decoder the last token -> scores (B,). With targets (B, T) also the mean cross-entropy, in nats, of what the
        trunk's own head makes of the answers' tokens, over the targets that are not -1."""
        real = idx >= 0
        read = real if mask is None else real & (mask > 0)
        read = read & (read.cumsum(1) == read.sum(1, keepdim=True)) if self.trunk.config.causal else read
        h = self.trunk.hidden(idx, pos=torch.where(real, real.cumsum(1) - 1, -1), read=read.nonzero(as_tuple=True))
        scores = (self.head.score(h, read) - self.shift) * self.scale
        return scores if targets is None else (scores, F.cross_entropy(
            self.trunk.lm_head(h[targets[read] >= 0]).float(), targets[targets >= 0]))

class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for the 2-D weights of hidden layers (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon). As torch.optim.Muon, but matrices of one shape go through Newton-Schulz as one
    batch, and on a CPU in float32: where bfloat16 is emulated it takes 40 times as long."""

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.1, steps=5):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, steps=steps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum, by_shape = group['lr'], group['momentum'], {}
            for p in (p for p in group['params'] if p.grad is not None):
                buffer = self.state[p].setdefault('momentum_buffer', torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - momentum)
                by_shape.setdefault(p.shape, []).append((p, p.grad.lerp(buffer, momentum)))  # Nesterov
            for (rows, columns), pairs in by_shape.items():
                update = orthogonalize(torch.stack([g for _, g in pairs]), group['steps'])
                for (p, _), u in zip(pairs, update):
                    p.mul_(1 - lr * group['weight_decay'])
                    p.add_(u.to(p.dtype), alpha=-lr * max(1, rows / columns) ** 0.5)

def orthogonalize(g, steps=5):
    """Bring all singular values of the matrices g (n, rows, columns) near 1 by Newton-Schulz steps of the
    quintic a x + b x^3 + c x^5, whose coefficients are chosen for their steep start."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.float() if g.is_cpu else g.bfloat16()
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
