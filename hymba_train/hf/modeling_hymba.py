"""Hymba for Hugging Face transformers, written from the mathematics of arXiv 2411.13676 and the published tensor names.

Every layer runs attention and a Mamba-1 SSM side by side on one projection and averages their normed outputs. Learned
*meta tokens* come before every sequence; since attention is causal their hidden states depend on nothing but the
parameters, so they are computed once a pass, not once a row. A pass works on flat rows::

    [meta token 0 .. M-1 | row 0: token 0 .. S-1 | row 1: ... | row B-1: ...]       shape [N, D], N = M + B * S

Padding never enters the computation: the real tokens of a row are moved to its front (whichever side was padded), what
follows them is invisible to them and leaves the states alone, and outputs are put back where the tokens were. A padded
row therefore computes what it would compute alone.

Letters: B batch, S tokens, M meta tokens, D hidden, E inner, N SSM states, R time-step rank, H query heads, G KV heads,
dk and dv head widths, W window, L slots of a key buffer.
"""

import functools
import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_hymba import HymbaConfig

try:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
except ImportError:
    create_block_mask = flex_attention = None
try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
except ImportError:
    selective_scan_fn = selective_state_update = None


FLOAT32_MODULES = ["A_log", "D", "dt_proj"]  # whatever the type of the rest; transformers 5.0 wants a list

# -- parts without state --------------------------------------------------------------------------------------------


def wide(x):
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class HymbaRMSNorm(nn.Module):
    """Normalise in float32, cast back, then scale: in bf16 the order matters."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        if torch.is_grad_enabled():
            normed = wide(x)
            normed = (normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        else:  # the same as one kernel on a GPU: seven norms a layer are much of a one-token step
            normed = F.rms_norm(x, x.shape[-1:], None, self.eps)
        return normed * self.weight.to(x.dtype)


def rope_tables(positions, config):
    """cos, sin [..., 1, dk/2] of positions [...]. Float32 always: bf16 frequencies are off by radians at 8k tokens."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    angles = positions.float()[..., None, None] * (1.0 / config.rotary_base**exponent)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """RoPE on halves of x [..., heads, dk]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def softmax_attention(q, k, v, visible, meta_k=None, meta_v=None):
    """q [B, H, S, dk] (scaled), k [B, G, L, dk], v [B, G, L, dv], visible bool [B or 1, S, L] -> [B, H, S, dv].

    Meta keys [G, M, dk] and values [G, M, dv], one copy for all rows, are seen by every query.
    """
    (b, h, s, dk), g = q.shape, k.shape[1]
    q = q.reshape(b, g, h // g * s, dk)  # the heads that share keys become rows of one product
    scores = (q @ k.transpose(-1, -2)).view(b, g, h // g, s, -1)
    scores = scores.masked_fill(~visible[:, None, None], -math.inf).flatten(2, 3)
    if meta_k is not None:
        scores = torch.cat((torch.einsum("bgqd,gmd->bgqm", q, meta_k), scores), dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
    m = 0 if meta_k is None else meta_k.shape[1]
    out = weights[..., m:] @ v
    if m:
        out = out + torch.einsum("bgqm,gmd->bgqd", weights[..., :m], meta_v)
    return out.view(b, h, s, -1)


def attend(q, k, v, meta_k, meta_v, window, visible, use_flex):
    """Attention of text queries q [B, H, S, dk] (scaled) over text keys [B, G, L, dk] and meta keys.

    visible None: keys and queries are the same tokens; query i sees key j iff j <= i and i - j <= window. Queries are
    taken in blocks, each with the keys its window reaches, so that no S x S table of scores is made.
    """
    num_queries, block = q.shape[2], 128 if q.device.type == "cpu" else 512
    if visible is None and use_flex and num_queries >= 128:
        b = k.shape[0]
        keys, values = (torch.cat((m.expand(b, *m.shape), t), 2) for m, t in ((meta_k, k), (meta_v, v)))
        mask = _block_mask(num_queries, meta_k.shape[1], window, q.device)
        return _compiled_flex()(q, keys, values, block_mask=mask, scale=1.0, enable_gqa=True)
    out = []
    for first in range(0, num_queries, block):
        last = min(first + block, num_queries)
        low, high, seen = 0, k.shape[2], None
        if visible is None:
            low, high = 0 if window is None else max(0, first - window), last
            distance = torch.arange(first, last, device=q.device)[:, None] - torch.arange(low, last, device=q.device)
            seen = ((distance >= 0) & (distance <= (last if window is None else window)))[None]
        else:
            seen = visible[:, first:last]
        out.append(softmax_attention(q[:, :, first:last], k[:, :, low:high], v[:, :, low:high], seen, meta_k, meta_v))
    return torch.cat(out, dim=2)


@functools.lru_cache(maxsize=8)
def _block_mask(num_queries, num_meta, window, device):
    def visible(batch, head, query, key):
        key = key - num_meta
        near = key <= query
        return (key < 0) | (near if window is None else near & (query - key <= window))

    return create_block_mask(visible, None, None, num_queries, num_meta + num_queries, device=device)


@functools.cache
def _compiled_flex():
    return torch.compile(flex_attention)


def scan(delta, du, A, B, C, state, lanes=None):
    """h_t = exp(delta_t A) h_{t-1} + du_t B_t; y_t = C_t . h_t. All float32 or wider, plain torch.

    delta, du [b, S, E], A [E, N], B, C [b, S, N], state [b, E, N] -> y [b, S, E], last state [b, E, N].

    The sequence is cut into lanes that run side by side from state zero; what came before a lane is then added, decayed
    by exp(A * sum of delta). On a GPU that makes 2 sqrt(S) steps of S; on a CPU one lane is fastest.
    """
    num_tokens = delta.shape[1]
    lanes = lanes or (1 if delta.device.type == "cpu" else max(1, math.isqrt(num_tokens)))
    steps = -(-num_tokens // lanes)
    pad = (0, 0, 0, lanes * steps - num_tokens)  # delta = du = 0 leaves the state alone
    delta, du, B, C = (F.pad(t, pad).unflatten(1, (lanes, steps)) for t in (delta, du, B, C))
    A, start = A.t(), state.transpose(1, 2)  # N is too short an innermost axis for vector instructions
    h = start[:, None] if lanes == 1 else start.new_zeros(start.shape[0], lanes, *start.shape[1:])
    work = 2**20 if delta.device.type == "cpu" else 2**28
    chunk = min(max(work // max(1, h.numel()), 1), 64)
    spans = [slice(first, first + chunk) for first in range(0, steps, chunk)]
    y = []
    for span in spans:
        decay = torch.exp(delta[:, :, span, None] * A)
        added = du[:, :, span, None] * B[:, :, span, :, None]
        states = []
        for t in range(decay.shape[2]):
            h = torch.addcmul(added[:, :, t], decay[:, :, t], h)
            states.append(h)
        y.append((torch.stack(states, 2) * C[:, :, span, :, None]).sum(-2))
    y = torch.cat(y, dim=2)
    if lanes > 1:
        total, before = delta.cumsum(2), [start]
        for lane in range(lanes):
            before.append(h[:, lane] + torch.exp(total[:, lane, -1, None] * A) * before[-1])
        h, before = before[-1][:, None], torch.stack(before[:-1], 1)[:, :, None]
        rest = [(torch.exp(total[:, :, s, None] * A) * before * C[:, :, s, :, None]).sum(-2) for s in spans]
        y = y + torch.cat(rest, dim=2)
    return y.flatten(1, 2)[:, :num_tokens], h[:, 0].transpose(1, 2)


# -- cache ----------------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """Shape and places of the rows of one pass."""

    num_meta: int  # leading rows that are meta tokens: M in a first pass, then 0
    batch: int
    seq: int
    positions: Tensor  # [B, S], of text: 0 is the first real token of its row
    cos: Tensor  # [N, 1, dk/2]
    sin: Tensor
    valid: Tensor | None = None  # bool [B, S]: real tokens, in front; None: all are
    counts: Tensor | None = None  # [B]: real tokens of each row
    visible: dict = field(default_factory=dict)  # window -> bool [B, S, L + S], where there are cached keys

    def split(self, x):
        """[N, ...] -> meta [M, ...], text [B, S, ...]."""
        return x[: self.num_meta], x[self.num_meta :].unflatten(0, (self.batch, self.seq))

    def join(self, meta, text):
        return torch.cat((meta, text.flatten(0, 1))) if self.num_meta else text.flatten(0, 1)

    def to(self, device, non_blocking=False):
        """accelerate calls this where a model is spread over devices."""
        if self.cos.device == torch.device(device):
            return self
        moved = {n: t.to(device) for n, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, visible={w: t.to(device) for w, t in self.visible.items()}, **moved)


class HymbaCache(Cache):
    """What decoding needs of the past. Its size is constant but for the keys of global layers.

    kv: per layer that computes keys: [k [B, G, L, dk], v [B, G, L, dv], meta_k [G, M, dk], meta_v [G, M, dv]], after
        RoPE. Local layers have L = W + 1 slots (W with decode_window "published"), global ones room for the sequence;
        the token at position p lies in slot p mod L. Layers that use another's keys hold none.
    conv: per layer, the last K - 1 inputs of the convolution [B, K-1, E]. ssm: per layer, [B, E, N] in float32.
    lengths: [B], real tokens of each row so far. seen: tokens fed so far, padding included.

    max_length: text tokens to make room for at once; without it buffers grow. All tensors stay where they are while
    they fit, so that a captured CUDA graph remains valid.
    """

    layers = ()  # of transformers' own caches: we have none of these
    is_compileable = False  # not by transformers: the model captures its own steps

    def __init__(self, config, max_length=None):  # without transformers' own, which is about its layers
        self.config, self.capacity, self.seen = config, max_length or 0, 0
        self.kv, self.conv, self.ssm = {}, {}, {}
        self.lengths, self.graph = None, None

    def __repr__(self):
        return f"HymbaCache({self.seen} tokens)"

    def __getstate__(self):
        return {**vars(self), "graph": None}  # copies capture their own

    def get_seq_length(self, layer_idx=0):
        return self.seen

    def get_max_cache_shape(self, layer_idx=0):
        return None

    def reorder_cache(self, beam_idx):
        """Take rows beam_idx [B], in place."""
        buffers = [t for entry in self.kv.values() for t in entry[:2]]
        for t in (*buffers, *self.conv.values(), *self.ssm.values(), self.lengths):
            t.copy_(t.index_select(0, beam_idx.to(t.device)))

    def reserve(self, num_tokens):
        """Make room for num_tokens more in global layers."""
        needed = self.seen + num_tokens
        if needed <= self.capacity:
            return
        self.capacity, self.graph = max(needed + 64, needed * 5 // 4), None
        for i, entry in self.kv.items():
            if self.config.window(i) is None:
                entry[:2] = [F.pad(t, (0, 0, 0, self.capacity - t.shape[2])) for t in entry[:2]]

    def num_slots(self, window):
        if window is None:
            return self.capacity
        return window + 1 if self.config.decode_window == "training" else window

    def advance(self, rows):
        """Count the tokens of a pass."""
        new = rows.counts if rows.counts is not None else rows.seq
        if self.lengths is None:
            self.lengths = torch.zeros(rows.batch, dtype=torch.int64, device=rows.cos.device)
        self.lengths += new
        self.seen += rows.seq

    def extend(self, i, k, v, meta_k, meta_v, rows, window):
        """Add text keys k [B, G, S, dk] and values of layer i. Returns all that the queries of this pass need, as an
        entry of ``kv``: in a first pass the new ones, later those held before and the new ones."""
        entry, num_slots = self.kv.get(i), self.num_slots(window)
        if entry is None:
            used = k, v, meta_k, meta_v
            empty = [t.new_zeros(rows.batch, t.shape[1], num_slots, t.shape[3]) for t in (k, v)]
            # Copies: views would keep the keys of the whole pass.
            entry = self.kv[i] = [*empty, meta_k.detach().clone(), meta_v.detach().clone()]
        else:
            used = torch.cat((entry[0], k), 2), torch.cat((entry[1], v), 2), entry[2], entry[3]
        start = rows.positions[:, :1]
        end = start + (rows.seq if rows.counts is None else rows.counts[:, None])
        source = self.newest_positions(end, window) - start  # index into this pass of what each slot is to hold
        fresh, index = (source >= 0)[:, None, :, None], source.clamp(min=0)[:, None, :, None]
        for buffer, new in zip(entry[:2], (k.detach(), v.detach()), strict=True):
            b, g, _, d = buffer.shape
            buffer.copy_(torch.where(fresh, new.gather(2, index.expand(b, g, num_slots, d)), buffer))
        return used

    def newest_positions(self, lengths, window):
        """[B, L]: newest position of a row of length lengths [B, 1] that each slot can hold; negative: none."""
        num_slots, last = self.num_slots(window), lengths - 1
        return last - (last - torch.arange(num_slots, device=lengths.device)) % num_slots

    def visible(self, positions, window):
        """bool [B, S, L + S]: which of the keys held, and then of the new ones, queries at positions [B, S] see."""
        keys = torch.cat((self.newest_positions(positions[:, :1], window), positions), 1)[:, None]
        distance = positions[:, :, None] - keys
        return (keys >= 0) & (distance >= 0) & (distance < self.num_slots(window))

    def store(self, i, taps, state):
        """Keep conv taps [B, K-1, E] and SSM state [B, E, N] of layer i, in place if there are some."""
        for kept, value in ((self.conv, taps.detach()), (self.ssm, wide(state.detach()))):
            if i in kept:
                kept[i].copy_(value)
            else:
                kept[i] = value.clone(memory_format=torch.contiguous_format)


class DecodeGraph:
    """One-token step of a model and a cache, captured as a CUDA graph."""

    def __init__(self, model, cache, embeds):
        self.embeds = embeds.clone()
        # A run moves the states on. Keys need no such care: a step writes the one slot that the next step writes again.
        states = [cache.lengths, *cache.conv.values(), *cache.ssm.values()]
        saved = [t.clone() for t in states]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model.step(self.embeds, cache)
                for t, value in zip(states, saved, strict=True):
                    t.copy_(value)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.hidden = model.step(self.embeds, cache)

    def __call__(self, embeds):
        self.embeds.copy_(embeds)
        self.graph.replay()
        return self.hidden.clone()


# -- layers ---------------------------------------------------------------------------------------------------------


class HymbaConvolution(nn.Conv1d):
    """Causal depthwise convolution and SiLU: [B, K-1+S, E], of which the first K-1 are the taps before -> [B, S, E]."""

    def forward(self, padded):
        weight, num_tokens = wide(self.weight[:, 0]), padded.shape[1] - self.weight.shape[-1] + 1
        total = wide(self.bias)
        for tap in range(weight.shape[-1]):
            total = torch.addcmul(total, wide(padded[:, tap : tap + num_tokens]), weight[:, tap])
        return F.silu(total).to(padded.dtype)


class HymbaTimeStep(nn.Linear):
    """The time step before softplus: the product in the type of x, the bias added in float32."""

    def forward(self, x):
        return wide(F.linear(x, self.weight.to(x.dtype))) + wide(self.bias)


class HymbaParameter(nn.Module):
    """One parameter, named "0" as published, and given by forward(), which is where accelerate loads offloaded ones."""

    def __init__(self, value):
        super().__init__()
        self.register_parameter("0", nn.Parameter(value))

    def forward(self):
        return wide(getattr(self, "0"))


class HymbaMixer(nn.Module):
    """in_proj -> attention and SSM -> mean of the normed branches, or both side by side -> out_proj."""

    def __init__(self, config, layer_idx):
        super().__init__()
        kind, d, e, n = config.layer_type[layer_idx], config.hidden_size, config.inner_size, config.mamba_d_state
        self.config, self.layer_idx, self.window = config, layer_idx, config.window(layer_idx)
        self.has_attention, self.has_ssm, self.source = kind != "m", kind != "a", config.kv_source(layer_idx)
        self.computes_keys = self.has_attention and self.source == layer_idx
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        a, self.concat = config.attention_size, config.branch_fusion == "concat"
        self.sizes = {"q": self.heads * config.head_dim} if self.has_attention else {}
        if self.computes_keys:
            self.sizes |= {"k": self.kv_heads * config.head_dim, "v": self.kv_heads * config.v_head_dim}
        if self.has_ssm:
            self.sizes |= {"x": e, "z": e}
            rank = config.mamba_dt_rank
            self.conv1d = HymbaConvolution(e, e, config.mamba_d_conv, groups=e)
            self.x_proj = nn.ModuleList([nn.Linear(e, rank + 2 * n, bias=False)])
            self.dt_proj = nn.ModuleList([HymbaTimeStep(rank, e)])
            self.A_log = HymbaParameter(torch.arange(1.0, n + 1).log().repeat(e, 1))
            self.D = HymbaParameter(torch.ones(e))
            self.dt_layernorm = HymbaRMSNorm(rank, config.rms_norm_eps)
            self.B_layernorm = HymbaRMSNorm(n, config.rms_norm_eps)
            self.C_layernorm = HymbaRMSNorm(n, config.rms_norm_eps)
        self.in_proj = nn.Linear(d, sum(self.sizes.values()), bias=False)
        if kind == "h":
            self.pre_avg_layernorm1 = HymbaRMSNorm(a, config.rms_norm_eps)
            self.pre_avg_layernorm2 = HymbaRMSNorm(e, config.rms_norm_eps)
        width = a + e if kind == "h" and self.concat else e if self.has_ssm else a
        self.out_proj = nn.Linear(width, d, bias=False)

    def forward(self, hidden, rows, keys, cache):
        """hidden [N, D]; keys: those of the source layer, where that is another. Returns [N, D] and the keys used."""
        parts, attention, ssm = self._project(hidden), None, None
        if self.has_attention:
            q = rotate(self._heads(parts["q"]), rows.cos, rows.sin) / math.sqrt(self.config.head_dim)
            if self.computes_keys:
                meta, text = zip(*map(rows.split, self._keys_and_values(parts, rows.cos, rows.sin)), strict=True)
                keys = (*(t.transpose(1, 2) for t in text), *(m.transpose(0, 1) for m in meta))
                if cache is not None:
                    keys = cache.extend(self.layer_idx, *keys, rows, self.window)
            attention = self._attend(q, keys, rows)
        if self.has_ssm:
            ssm = self._ssm(parts["x"], parts["z"], rows, cache)
        return self._fuse(attention, ssm), keys

    def step(self, hidden, cos, sin, slot, visible, keys, taps, state):
        """One token of each row, hidden [B, D], on static shapes; keys, taps [B, K-1, E] and state [B, E, N] are
        updated in place. slot [B, 1, 1, 1]: where the token's keys go; visible [B, 1, L]."""
        parts, attention, ssm = self._project(hidden), None, None
        if self.has_attention:
            k, v, meta_k, meta_v = keys
            q = rotate(self._heads(parts["q"]), cos, sin) / math.sqrt(self.config.head_dim)
            if self.computes_keys:
                for buffer, new in zip((k, v), self._keys_and_values(parts, cos, sin), strict=True):
                    buffer.scatter_(2, slot.expand(*new.shape[:2], 1, new.shape[2]), new[:, :, None])
            meta = (meta_k, meta_v) if meta_k.shape[1] else ()
            attention = softmax_attention(q[:, :, None], k, v, visible, *meta).flatten(1)
        if self.has_ssm:
            padded = torch.cat((taps, parts["x"][:, None]), 1)
            u = self.conv1d(padded)[:, 0]
            taps.copy_(padded[:, 1:])
            ssm = self._scan_step(u, *self._scan_inputs(u), parts["z"], state)
        return self._fuse(attention, ssm)

    def _project(self, hidden):
        return dict(zip(self.sizes, self.in_proj(hidden).split(list(self.sizes.values()), dim=-1), strict=True))

    def _heads(self, x, heads=None):
        return x.unflatten(-1, (heads or self.heads, -1))

    def _keys_and_values(self, parts, cos, sin):
        return rotate(self._heads(parts["k"], self.kv_heads), cos, sin), self._heads(parts["v"], self.kv_heads)

    def _attend(self, q, keys, rows):
        """q [N, H, dk] (scaled) -> [N, H * dv]."""
        k, v, meta_k, meta_v = keys
        meta_q, text_q = rows.split(q)
        use_flex = (
            flex_attention is not None and q.is_cuda and self.config.attn_implementation_new == "flex"
            and min(q.shape[-1], v.shape[-1]) >= 16 and q.shape[-1] & (q.shape[-1] - 1) == 0
            and v.shape[-1] & (v.shape[-1] - 1) == 0
        )  # fmt: skip
        text_q, visible = text_q.transpose(1, 2), rows.visible.get(self.window)
        text = attend(text_q, k, v, meta_k, meta_v, self.window, visible, use_flex).transpose(1, 2)
        if not rows.num_meta:
            return text.flatten(0, 1).flatten(1)
        causal = torch.ones(1, rows.num_meta, rows.num_meta, dtype=torch.bool, device=q.device).tril()
        meta = softmax_attention(meta_q.transpose(0, 1)[None], meta_k[None], meta_v[None], causal)[0].transpose(0, 1)
        return rows.join(meta, text).flatten(1)

    def _ssm(self, x, z, rows, cache):
        """x, z [N, E] -> [N, E]. A first pass starts from zero at the first meta token, later ones from the cache."""
        i, num_taps = self.layer_idx, self.config.mamba_d_conv - 1
        meta_x, text_x = rows.split(x)
        past = cache is not None and i in cache.conv
        taps = cache.conv[i] if past else x.new_zeros(1, num_taps, x.shape[-1])
        meta_u = None
        if rows.num_meta:
            padded = torch.cat((taps, meta_x[None]), 1)
            meta_u, taps = self.conv1d(padded)[0], padded[:, rows.num_meta :]
        padded = torch.cat((taps.expand(rows.batch, -1, -1), text_x), 1)
        u = rows.join(meta_u, self.conv1d(padded))
        state = cache.ssm[i] if past else None
        y, state = self._scan(u, *self._scan_inputs(u), z, state, rows)
        if cache is not None:
            ends = rows.counts if rows.counts is not None else torch.full((rows.batch,), rows.seq, device=x.device)
            index = ends[:, None, None] + torch.arange(num_taps, device=x.device)[:, None]
            cache.store(i, padded.gather(1, index.expand(-1, -1, x.shape[-1])), state)
        return y

    def _scan_inputs(self, u):
        """u [..., E] after the convolution -> time step before softplus [..., E] (float32), B and C [..., N]."""
        n = self.config.mamba_d_state
        dt, B, C = self.x_proj[0](u).split([self.config.mamba_dt_rank, n, n], dim=-1)
        return wide(self.dt_proj[0](self.dt_layernorm(dt))), self.B_layernorm(B), self.C_layernorm(C)

    def _scan(self, u, dt, B, C, z, state, rows):
        """Scan of all rows, with skip and gate: [N, E]; last state of the text rows [B, E, N]."""
        A, D = -torch.exp(self.A_log()), self.D()
        if self._use_kernels(u) and state is None:
            return self._scan_kernel(u, dt, B, C, z, rows, A, D)
        delta = F.softplus(dt)
        du = delta * wide(u)
        (meta_delta, delta), (meta_du, du) = rows.split(delta), rows.split(du)
        (meta_B, B), (meta_C, C) = rows.split(wide(B)), rows.split(wide(C))
        if rows.valid is not None:  # padding leaves the state alone
            delta, du = (t.masked_fill(~rows.valid[:, :, None], 0) for t in (delta, du))
        state = A.new_zeros(1, *A.shape) if state is None else state.to(A.dtype)
        meta_y = None
        if rows.num_meta:
            meta_y, state = scan(meta_delta[None], meta_du[None], A, meta_B[None], meta_C[None], state)
        y, state = scan(delta, du, A, B, C, state.expand(rows.batch, *A.shape))
        y = rows.join(meta_y[0] if rows.num_meta else None, y)
        return (torch.addcmul(y, D, wide(u)) * F.silu(wide(z))).to(u.dtype), state

    def _scan_kernel(self, u, dt, B, C, z, rows, A, D):
        """The same with mamba-ssm, which takes no first state: meta tokens are put before every row."""
        dt, bias = self._without_bias(dt, u)
        if rows.valid is not None:
            held = rows.join(rows.valid.new_ones(rows.num_meta), rows.valid)
            dt = dt.masked_fill(~held[:, None], -1e4)  # softplus of it is 0
        rest = []
        for t in (u, dt, B, C, z):
            meta, text = rows.split(t)
            rest.append(torch.cat((meta.expand(rows.batch, *meta.shape), text), 1).transpose(1, 2).contiguous())
        u, dt, B, C, z = rest
        y, state = selective_scan_fn(
            u, dt, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True, return_last_state=True
        )
        y = y.transpose(1, 2)
        return rows.join(y[0, : rows.num_meta], y[:, rows.num_meta :]), state

    def _scan_step(self, u, dt, B, C, z, state):
        """One step of every row, u [B, E]; state is updated in place."""
        A, D = -torch.exp(self.A_log()), self.D()
        if self._use_kernels(u) and not torch.compiler.is_compiling():  # which fuses the lines below by itself
            dt, bias = self._without_bias(dt, u)
            return selective_state_update(state, u, dt, A, B, C, D, z=z, dt_bias=bias, dt_softplus=True)
        delta = F.softplus(dt)
        new = torch.exp(delta[:, :, None] * A) * state + (delta * wide(u))[:, :, None] * wide(B)[:, None]
        state.copy_(new)
        y = (new * wide(C)[:, None]).sum(-1) + D * wide(u)
        return (y * F.silu(wide(z))).to(u.dtype)

    def _without_bias(self, dt, u):
        """The kernels take the product in u's type and the bias in float32."""
        bias = wide(self.dt_proj[0].bias)
        return (dt - bias).to(u.dtype), bias

    def _use_kernels(self, x):
        offloaded = self.dt_proj[0].bias.is_meta  # accelerate brings it in for forward() alone
        return selective_scan_fn is not None and x.is_cuda and self.config.use_mamba_kernels and not offloaded

    def _fuse(self, attention, ssm):
        if attention is None or ssm is None:
            return self.out_proj(ssm if attention is None else attention)
        attention, ssm = self.pre_avg_layernorm1(attention), self.pre_avg_layernorm2(ssm)
        return self.out_proj(torch.cat((attention, ssm), -1) if self.concat else (attention + ssm) / 2)


class HymbaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class HymbaMoE(nn.Module):
    """The published names have room for experts; there is one, and no router."""

    def __init__(self, config):
        super().__init__()
        self.experts = nn.ModuleList([HymbaMLP(config)])

    def forward(self, x):
        return self.experts[0](x)


class HymbaDecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.input_layernorm = HymbaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mamba = HymbaMixer(config, layer_idx)
        self.has_mlp = config.layer_has_mlp[layer_idx]
        if self.has_mlp:
            self.pre_moe_layernorm = HymbaRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.moe = HymbaMoE(config)

    def forward(self, hidden, k, v, meta_k, meta_v, rows, cache=None):
        """Keys are arguments of their own, and returned, for gradient checkpointing to see them."""
        rows = rows.to(hidden.device)
        mixed, keys = self.mamba(self.input_layernorm(hidden), rows, (k, v, meta_k, meta_v), cache)
        return self._mlp(hidden + mixed), *keys

    def step(self, hidden, *args):
        return self._mlp(hidden + self.mamba.step(self.input_layernorm(hidden), *args))

    def _mlp(self, hidden):
        return hidden + self.moe(self.pre_moe_layernorm(hidden)) if self.has_mlp else hidden


# -- models ---------------------------------------------------------------------------------------------------------


class HymbaPreTrainedModel(PreTrainedModel):
    config_class = HymbaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("HymbaDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _keep_in_fp32_modules = _keep_in_fp32_modules_strict = FLOAT32_MODULES
    _is_stateful = True  # a state cannot go back: no assisted decoding
    _supports_sdpa = _supports_flex_attn = True  # accepted; what runs is chosen by attn_implementation_new

    @torch.no_grad()
    def _init_weights(self, module):
        """Linear and embedding weights normal, A = -1..-N, D = 1, softplus of the dt bias log-uniform in 1e-3..1e-1."""
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Conv1d):
                nn.init.zeros_(module.bias)
            elif getattr(module, "bias", None) is not None and not getattr(module.bias, "_is_hf_initialized", False):
                step = torch.empty_like(module.bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
                module.bias.copy_(step + torch.log(-torch.expm1(-step)))
        elif isinstance(module, HymbaRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, HymbaParameter) and not getattr(module._parameters["0"], "_is_hf_initialized", False):
            parameter = module._parameters["0"]
            numbers = torch.arange(1.0, parameter.shape[-1] + 1, device=parameter.device)
            parameter.copy_(numbers.log().expand_as(parameter) if parameter.dim() == 2 else parameter.new_ones(()))
        elif isinstance(module, HymbaModel) and module.memory_tokens is not None:
            nn.init.normal_(module.memory_tokens, std=std)


class HymbaModel(HymbaPreTrainedModel):
    """Embedding, meta tokens, layers and final norm. position_ids are not used: positions follow from the mask."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        m = config.num_memory_tokens
        self.memory_tokens = nn.Parameter(torch.randn(m, config.hidden_size)) if m else None
        self.layers = nn.ModuleList(HymbaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.final_layernorm = HymbaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None, **kwargs,
    ):  # fmt: skip
        """Hidden states of the tokens given: [B, S, D]; meta tokens are not among them.

        attention_mask: [B, S], or [B, past + S] with a cache; 0 marks padding, wherever it stands. What comes out at a
        padding token is the hidden state of the last real token of the row.
        """
        if output_attentions:
            raise ValueError("output_attentions: Hymba keeps no attention weights")
        if past_key_values is not None and not isinstance(past_key_values, HymbaCache):
            raise ValueError(f"past_key_values must be a HymbaCache, not {type(past_key_values).__name__}")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        use_cache = (self.config.use_cache if use_cache is None else use_cache) and not checkpointing
        cache = past_key_values if past_key_values is not None or not use_cache else HymbaCache(self.config)
        mask = _padding_mask(attention_mask, embeds)
        if mask is None and cache is not None and self._can_step(embeds, cache, output_hidden_states):
            final, states = self._decode(embeds, cache), None
        else:
            final, states = self._run(embeds, mask, cache, checkpointing, output_hidden_states)
        out = BaseModelOutputWithPast(last_hidden_state=final, past_key_values=cache, hidden_states=states)
        return out if return_dict is not False else out.to_tuple()

    def _run(self, embeds, mask, cache, checkpointing, keep_states):
        """A pass over any number of tokens."""
        if mask is not None:
            order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)  # real tokens first
            embeds = embeds.gather(1, order[:, :, None].expand_as(embeds))
        if cache is not None:
            cache.reserve(embeds.shape[1])
        rows = self._rows(embeds, mask, cache)
        hidden = embeds.flatten(0, 1)
        if rows.num_meta:
            hidden = torch.cat((self.memory_tokens.to(hidden), hidden))
        keys, states, nothing = {}, [], (None,) * 4
        for layer in self.layers:
            if keep_states:
                states.append(_back(rows.split(hidden)[1], mask))
            arguments = (hidden, *keys.get(layer.mamba.source, nothing), rows)
            if checkpointing:
                hidden, *own = self._gradient_checkpointing_func(layer.__call__, *arguments)
            else:
                hidden, *own = layer(*arguments, cache)
            if layer.mamba.computes_keys:
                keys[layer.mamba.layer_idx] = own
        if cache is not None:
            cache.advance(rows)
        final = _back(self.final_layernorm(rows.split(hidden)[1]), mask)
        return final, (*states, final) if keep_states else None

    def _rows(self, embeds, mask, cache):
        (b, s, _), m = embeds.shape, self.config.num_memory_tokens
        first = cache is None or cache.lengths is None
        positions, visible = torch.arange(s, device=embeds.device).expand(b, -1), {}
        if first:
            flat = torch.cat((torch.arange(m, device=embeds.device), positions.flatten() + m))
        else:
            positions = positions + cache.lengths[:, None]
            flat = positions.flatten() + m
            visible = {w: cache.visible(positions, w) for w in {layer.mamba.window for layer in self.layers}}
        counts = None if mask is None else mask.sum(1)
        valid = None if mask is None else torch.arange(s, device=mask.device) < counts[:, None]
        cos, sin = rope_tables(flat, self.config)
        return Rows(m if first else 0, b, s, positions, cos, sin, valid, counts, visible)

    # -- one token at a time ----------------------------------------------------------------------------------------

    def _can_step(self, embeds, cache, keep_states):
        spread = any(hasattr(layer, "_hf_hook") for layer in self.layers)  # accelerate's hooks act on forward alone
        return embeds.shape[1] == 1 and cache.seen and not (torch.is_grad_enabled() or keep_states or spread)

    def _decode(self, embeds, cache):
        cache.reserve(1)
        if embeds.is_cuda and self.config.decode_backend != "eager" and not torch.cuda.is_current_stream_capturing():
            with torch.cuda.device(embeds.device):
                if cache.graph is None:
                    cache.graph = DecodeGraph(self, cache, embeds)
                hidden = cache.graph(embeds)
        else:
            hidden = self.step(embeds, cache)
        cache.seen += 1
        return hidden

    def step(self, embeds, cache):
        """One token of each row [B, 1, D] -> [B, 1, D]. Static shapes, nothing read back from the device, the cache
        updated in place: fit for capture. The caller counts ``cache.seen``."""
        lengths, places = cache.lengths, {}
        cos, sin = rope_tables(lengths + self.config.num_memory_tokens, self.config)
        run = _compiled_step if self.config.decode_backend == "compile" else HymbaDecoderLayer.step
        hidden = embeds[:, 0]
        for layer in self.layers:
            mixer = layer.mamba
            i, keys = mixer.layer_idx, tuple(cache.kv.get(mixer.source, ()))
            num_slots = keys[0].shape[2] if mixer.has_attention else 0
            if num_slots not in places:
                slot = lengths % max(num_slots, 1)
                seen = torch.arange(num_slots, device=lengths.device) <= lengths[:, None]
                places[num_slots] = slot[:, None, None, None], seen[:, None]
            hidden = run(layer, hidden, cos, sin, *places[num_slots], keys, cache.conv.get(i), cache.ssm.get(i))
        lengths += 1
        return self.final_layernorm(hidden)[:, None]


def _compiled_step(*args):
    # Kinds of layers, times one row or several, times types: more graphs than torch allows by default.
    with torch._dynamo.config.patch(recompile_limit=64):
        return _compiled_layer_step()(*args)


@functools.cache
def _compiled_layer_step():
    return torch.compile(HymbaDecoderLayer.step, fullgraph=True)


def _padding_mask(attention_mask, embeds):
    """bool [B, S] of the tokens of this pass, or None if all are real."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] < embeds.shape[1]:
        raise ValueError(f"attention_mask must be [B, past + S], not {list(attention_mask.shape)}")
    mask = attention_mask[:, -embeds.shape[1] :].to(embeds.device) != 0
    return None if bool(mask.all()) else mask


def _back(text, mask):
    """Undo the ordering of _run: [B, S, D], padding takes what the last real token of its row has."""
    if mask is None:
        return text
    place = torch.where(mask, mask.cumsum(1) - 1, mask.sum(1, keepdim=True) - 1).clamp(min=0)
    return text.gather(1, place[:, :, None].expand_as(text))


class HymbaForCausalLM(HymbaPreTrainedModel, GenerationMixin):
    # transformers 5 wants to know where a tied weight comes from
    _tied_weights_keys = (
        {"lm_head.weight": "model.embed_tokens.weight"}
        if int(transformers.__version__.split(".")[0]) >= 5
        else ["lm_head.weight"]
    )

    def __init__(self, config):
        super().__init__(config)
        self.model = HymbaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def get_decoder(self):
        return self.model

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None,
        logits_to_keep=0, num_items_in_batch=None, **kwargs,
    ):  # fmt: skip
        """Logits [B, S, V] of the next token, in float32; the last ``logits_to_keep`` if that is not 0.

        labels: [B, S], the input ids; they are shifted here, -100 is not predicted, and padding predicts nothing. The
        loss is their mean (their sum / num_items_in_batch where that is given).
        """
        outputs = self.model(
            input_ids, attention_mask, None, past_key_values, inputs_embeds, use_cache, output_attentions,
            output_hidden_states,
        )  # fmt: skip
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = wide(self.lm_head(outputs.last_hidden_state[:, keep]))
        loss = None
        if labels is not None:
            if logits.shape[1] != labels.shape[1]:
                raise ValueError("labels need the logits of every token: leave out logits_to_keep")
            targets = labels[:, 1:].to(logits.device)
            if attention_mask is not None:
                predicts = attention_mask[:, -labels.shape[1] : -1].to(logits.device) != 0
                targets = targets.masked_fill(~predicts, -100)
            total = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum")
            loss = total / (num_items_in_batch if num_items_in_batch is not None else (targets != -100).sum())
        out = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )
        return out if return_dict is not False else out.to_tuple()

    # -- generate() -------------------------------------------------------------------------------------------------

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Called by generate(), in every version with other arguments behind these two."""
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = HymbaCache(self.config, generation_config.max_length)

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, use_cache=True,
        next_sequence_length=None, cache_position=None, **kwargs,
    ):  # fmt: skip
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if inputs_embeds is not None and not seen:
            # Without a cache every step starts from the first token; input_ids are then those generated since.
            new = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1] - inputs_embeds.shape[1]
            generated = self.model.embed_tokens(input_ids[:, input_ids.shape[1] - new :])
            inputs = {"inputs_embeds": torch.cat((inputs_embeds, generated), 1)}
        else:
            new = next_sequence_length  # transformers 5
            if new is None and cache_position is not None:  # transformers 4
                new = len(cache_position)
            if new is None:
                new = (input_ids if attention_mask is None else attention_mask).shape[1] - seen
            inputs = {"input_ids": input_ids[:, -new:] if new > 0 else input_ids}  # else: the new ones alone were given
        inputs |= {"past_key_values": past_key_values, "attention_mask": attention_mask, "use_cache": use_cache}
        return inputs | {k: v for k, v in kwargs.items() if k in ("logits_to_keep", "output_hidden_states")}


HymbaConfig.register_for_auto_class()
HymbaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
