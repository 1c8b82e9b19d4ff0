"""The whole model in plain torch, in one file: the oracle of the tests. Clear, slow, for small sizes.

Written from hymba-architecture section 2 alone, and independent of :mod:`hymba_train.ops` and :mod:`hymba_train.model`:
it computes [meta | text] of every row in full, as published. Letters: B batch, S text tokens, M meta tokens, T = M + S,
D hidden, E inner, N SSM state, R dt rank, H query heads, G KV heads, dk and dv head widths, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hymba_train.config.schema import ModelConfig
from hymba_train.describe.dims import ModelDims, effective_rotary_base
from hymba_train.describe.mixers.mamba2 import Mamba2Dims
from hymba_train.describe.stack import LayerDescription, resolve_stack

IGNORE = -100
"""Label of a position that is not predicted."""


@dataclass
class OracleOutput:
    """What a forward pass computed. ``attention``, ``ssm``, ``keys``, ``values`` have one entry a layer with them."""

    logits: Tensor  # [B, S, V], text positions only
    embeddings: Tensor  # [B, T, D], input of layer 0
    hidden: list[Tensor]  # per layer: residual stream after it, [B, T, D]
    final_norm: Tensor  # [B, T, D]
    attention: dict[int, Tensor]  # attention branch before its norm, [B, T, E]
    ssm: dict[int, Tensor]  # SSM branch (after D and the gate) before its norm, [B, T, E]
    keys: dict[int, Tensor]  # of layers that compute them, after RoPE: [B, T, G, dk]
    values: dict[int, Tensor]  # [B, T, G, dv]
    token_losses: Tensor | None = None  # [B, S] float32, 0 where the label is -100
    loss: Tensor | None = None  # mean over the labels that are not -100


@dataclass
class _Context:
    """Where each of the T tokens stands, and what layers leave for others."""

    num_meta: int
    positions: Tensor  # [B, T]: 0..M-1 for meta tokens, M + offset in its document for text
    index: Tensor  # [T]: place in the row
    documents: Tensor  # [B, T]; meta tokens are in none
    cos: Tensor  # [B, T, dk / 2] float32
    sin: Tensor
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)
    ssm: dict[int, Tensor] = field(default_factory=dict)

    def visible(self, window: int | None) -> Tensor:
        """[B, T, T] bool: query i sees key j (2.7)."""
        query, key = self.positions[:, :, None], self.positions[:, None, :]
        is_meta = (self.index < self.num_meta)[None, None, :]
        same_document = self.documents[:, :, None] == self.documents[:, None, :]
        near = True if window is None else (query - key <= window) | is_meta
        return (same_document | is_meta) & (self.index[:, None] >= self.index[None, :]) & near


class OracleHymba(nn.Module):
    """Hymba. Parameters are those of :func:`hymba_train.describe.model_tensors`, under the same names and shapes.

    A fresh instance holds random weights good for tests, not the recipe's initialisation.
    """

    def __init__(self, config: ModelConfig, rope_type: str | None = None) -> None:
        super().__init__()
        self.config, self.dims, self.layers = config, ModelDims.of(config), resolve_stack(config)
        self.rotary_base = effective_rotary_base(config, rope_type)
        d = self.dims
        self.embedding = nn.Module()
        self.embedding.word_embeddings = _matrix(config, d.vocab_size, d.hidden_size)
        if d.num_meta_tokens:
            self.embedding.meta_tokens = nn.Parameter(torch.randn(d.num_meta_tokens, d.hidden_size))
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(_Layer(config, layer) for layer in self.layers)
        self.final_norm = _RMSNorm(d.hidden_size, config.layernorm_epsilon)
        if config.untie_embeddings_and_output_weights:
            self.output_layer = _matrix(config, d.vocab_size, d.hidden_size)

    def forward(self, tokens: Tensor, labels: Tensor | None = None, segment_ids: Tensor | None = None) -> OracleOutput:
        """tokens [B, S] int64; labels [B, S] int64, already shifted (label s is what token s predicts), -100: none;
        segment_ids [B, S] int64, one number per document of a row: each computes what it would alone in a row."""
        num_meta, table = self.dims.num_meta_tokens, self.embedding.word_embeddings.weight
        x = table[tokens]
        if num_meta:
            x = torch.cat((self.embedding.meta_tokens.expand(len(tokens), -1, -1), x), dim=1)
        context = self._context(tokens, segment_ids)
        embeddings, hidden = x, []
        for layer in self.decoder.layers:
            x = layer(x, context)
            hidden.append(x)
        final = self.final_norm(x)
        head = self.output_layer.weight if self.config.untie_embeddings_and_output_weights else table
        logits = final[:, num_meta:] @ head.t()
        output = OracleOutput(
            logits, embeddings, hidden, final, context.attention, context.ssm, context.keys, context.values
        )
        if labels is not None:
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
            output.token_losses = losses.view(labels.shape)
            output.loss = losses.sum() / (labels != IGNORE).sum()
        return output

    def _context(self, tokens: Tensor, segment_ids: Tensor | None) -> _Context:
        (batch, num_text), num_meta = tokens.shape, self.dims.num_meta_tokens
        positions = torch.arange(num_meta + num_text, device=tokens.device).repeat(batch, 1)
        documents = torch.zeros_like(positions)
        if segment_ids is not None:
            documents[:, num_meta:] = segment_ids
            for row in range(batch):
                for s in range(1, num_text):
                    same = segment_ids[row, s] == segment_ids[row, s - 1]
                    positions[row, num_meta + s] = positions[row, num_meta + s - 1] + 1 if same else num_meta
        dk = self.dims.head_dim
        frequency = 1.0 / self.rotary_base ** (torch.arange(0, dk, 2, dtype=torch.float32, device=tokens.device) / dk)
        angles = positions[:, :, None].float() * frequency
        index = torch.arange(num_meta + num_text, device=tokens.device)
        return _Context(num_meta, positions, index, documents, angles.cos(), angles.sin())


class _RMSNorm(nn.Module):
    """Normalise in float32, cast back, then scale: the order of T5 (2.2)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


class _Layer(nn.Module):
    """Pre-norm layer: mixer, then FFN where it has one (2.2, 2.10)."""

    def __init__(self, config: ModelConfig, layer: LayerDescription) -> None:
        super().__init__()
        d = ModelDims.of(config)
        self.has_ffn = layer.has_ffn
        self.input_norm = _RMSNorm(d.hidden_size, config.layernorm_epsilon)
        self.mixer = _OWN.get(layer.mixer, _Mixer)(config, layer)
        if self.has_ffn:
            self.ffn_norm = _RMSNorm(d.hidden_size, config.layernorm_epsilon)
            self.ffn = nn.Module()
            self.ffn.linear_fc1 = _matrix(config, 2 * d.ffn_hidden_size, d.hidden_size)
            self.ffn.linear_fc2 = _matrix(config, d.hidden_size, d.ffn_hidden_size)

    def forward(self, x: Tensor, context: _Context) -> Tensor:
        x = x + self.mixer(self.input_norm(x), context)
        if self.has_ffn:
            gate, up = self.ffn.linear_fc1(self.ffn_norm(x)).chunk(2, dim=-1)
            x = x + self.ffn.linear_fc2(F.silu(gate) * up)
        return x


class _Mixer(nn.Module):
    """in_proj -> attention and / or SSM -> mean of the normed branches (hybrid), or both -> out_proj (2.3 to 2.9)."""

    def __init__(self, config: ModelConfig, layer: LayerDescription) -> None:
        super().__init__()
        d = self.dims = ModelDims.of(config)
        self.layer, eps, self.concat = layer, config.layernorm_epsilon, config.branch_fusion == "concat"
        self.sizes: dict[str, int] = {}  # rows of in_proj, in order
        if layer.has_attention:
            self.sizes["q"] = d.num_heads * d.head_dim
            if layer.kv_role != "consumer":
                self.sizes["k"] = d.num_kv_heads * d.head_dim
                self.sizes["v"] = d.num_kv_heads * d.value_head_dim
        if layer.has_ssm:
            self.sizes["x"] = self.sizes["z"] = d.inner_size
        self.in_proj = _matrix(config, sum(self.sizes.values()), d.hidden_size)
        if layer.has_ssm:
            self.conv = _conv(d.inner_size, d.conv_width)
            self.x_proj = _matrix(config, d.dt_rank + 2 * d.state_dim, d.inner_size)
            self.dt_norm, self.B_norm, self.C_norm = (_RMSNorm(n, eps) for n in (d.dt_rank, d.state_dim, d.state_dim))
            self.dt_proj = _matrix(config, d.inner_size, d.dt_rank)
            self.dt_bias = nn.Parameter(torch.linspace(-6.9, -2.25, d.inner_size))  # softplus: about 1e-3..1e-1
            self.A_log = nn.Parameter(torch.arange(1.0, d.state_dim + 1).log().repeat(d.inner_size, 1))
            self.D = nn.Parameter(torch.ones(d.inner_size))
        if layer.mixer == "hybrid":
            self.attention_norm, self.ssm_norm = _RMSNorm(d.attention_size, eps), _RMSNorm(d.inner_size, eps)
        width = d.inner_size if layer.has_ssm else d.attention_size
        if layer.mixer == "hybrid" and self.concat:
            width += d.attention_size
        self.out_proj = _matrix(config, d.hidden_size, width)

    def forward(self, x: Tensor, context: _Context) -> Tensor:
        layer = self.layer
        parts = dict(zip(self.sizes, self.in_proj(x).split(list(self.sizes.values()), dim=-1), strict=True))
        if layer.has_attention:
            attention = context.attention[layer.index] = self._attention(parts, context)
        if layer.has_ssm:
            ssm = context.ssm[layer.index] = self._ssm(parts["x"], parts["z"], context)
        if layer.mixer == "hybrid":
            attention, ssm = self.attention_norm(attention), self.ssm_norm(ssm)
            return self.out_proj(torch.cat((attention, ssm), dim=-1) if self.concat else (attention + ssm) / 2)
        return self.out_proj(attention if layer.has_attention else ssm)

    def _attention(self, parts: dict[str, Tensor], context: _Context) -> Tensor:
        """Dense attention of all T tokens (2.6, 2.7); a consumer takes its producer's rotated keys, and values (3)."""
        d, layer = self.dims, self.layer
        q = _rotate(parts["q"].unflatten(-1, (d.num_heads, d.head_dim)), context)
        if layer.kv_role == "consumer":
            k, v = context.keys[layer.kv_source], context.values[layer.kv_source]
        else:
            k = context.keys[layer.index] = _rotate(parts["k"].unflatten(-1, (d.num_kv_heads, d.head_dim)), context)
            v = context.values[layer.index] = parts["v"].unflatten(-1, (d.num_kv_heads, d.value_head_dim))
        share = d.num_heads // d.num_kv_heads  # query head h uses KV head h // share
        k, v = k.repeat_interleave(share, dim=2), v.repeat_interleave(share, dim=2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(d.head_dim)
        scores = scores.masked_fill(~context.visible(layer.window)[:, None], -math.inf)
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        return torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)

    def _ssm(self, x: Tensor, z: Tensor, context: _Context) -> Tensor:
        """Convolution, projections with inner norms, scan, gate (2.4, 2.8)."""
        d = self.dims
        u = F.silu(_convolve(x, self.conv, context))
        dt, b, c = self.x_proj(u).split([d.dt_rank, d.state_dim, d.state_dim], dim=-1)
        dt = self.dt_proj(self.dt_norm(dt))
        y = self._scan(u, dt, self.B_norm(b), self.C_norm(c), context)
        wide_z = z.to(torch.promote_types(z.dtype, torch.float32))
        return (y * F.silu(wide_z)).to(x.dtype)

    def _scan(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, context: _Context) -> Tensor:
        """u, dt [B, T, E], B, C [B, T, N] -> y [B, T, E] before the gate, float32 or wider. A document starts from the
        state that the meta tokens leave."""
        wide = torch.promote_types(u.dtype, torch.float32)
        u, B, C = u.to(wide), B.to(wide), C.to(wide)
        delta = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        A = -torch.exp(self.A_log.to(wide))
        h = after_meta = u.new_zeros(u.shape[0], *A.shape)
        outputs = []
        for t in range(u.shape[1]):
            if t == context.num_meta:
                after_meta = h
            starts = (context.positions[:, t] == context.num_meta)[:, None, None]
            h = torch.where(starts, after_meta, h)
            h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
            outputs.append((h * C[:, t, None, :]).sum(-1) + self.D.to(wide) * u[:, t])
        return torch.stack(outputs, dim=1)


class _Mamba2(nn.Module):
    """Mamba-2 (arXiv 2405.21060, section 7): one decay a head, a step at a time; RMSNorm behind the gate."""

    def __init__(self, config: ModelConfig, layer: LayerDescription) -> None:
        super().__init__()
        d = self.dims = ModelDims.of(config)
        self.own = Mamba2Dims.of(config)
        heads, bc = self.own.num_heads, self.own.bc_size
        self.in_proj = _matrix(config, 2 * d.inner_size + heads, d.hidden_size)
        self.bc_proj = _matrix(config, bc, d.hidden_size)
        self.conv, self.bc_conv = _conv(d.inner_size, d.conv_width), _conv(bc, d.conv_width)
        self.dt_bias = nn.Parameter(torch.linspace(-6.9, -2.25, heads))
        self.A_log = nn.Parameter(torch.linspace(1, 16, heads).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.gated_norm = _RMSNorm(d.inner_size, config.layernorm_epsilon)
        self.out_proj = _matrix(config, d.hidden_size, d.inner_size)

    def forward(self, x: Tensor, context: _Context) -> Tensor:
        d = self.dims
        inner, z, dt = self.in_proj(x).split([d.inner_size, d.inner_size, self.own.num_heads], dim=-1)
        bc = F.silu(_convolve(self.bc_proj(x), self.bc_conv, context))
        y = self._scan(F.silu(_convolve(inner, self.conv, context)), dt, *bc.chunk(2, dim=-1), context)
        wide_z = z.to(torch.promote_types(z.dtype, torch.float32))
        return self.out_proj(self.gated_norm(y * F.silu(wide_z)).to(x.dtype))

    def _scan(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, context: _Context) -> Tensor:
        """u [B, T, E], dt [B, T, heads], B and C [B, T, groups * N] -> y [B, T, E], float32 or wider."""
        wide = torch.promote_types(u.dtype, torch.float32)
        heads, groups = self.own.num_heads, self.own.num_groups
        u = u.to(wide).unflatten(-1, (heads, -1))
        B, C = (t.to(wide).unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, dim=2) for t in (B, C))
        delta, A = F.softplus(dt.to(wide) + self.dt_bias.to(wide)), -torch.exp(self.A_log.to(wide))
        h = after_meta = u.new_zeros(len(u), heads, u.shape[-1], self.own.state_dim)
        outputs = []
        for t in range(u.shape[1]):
            if t == context.num_meta:
                after_meta = h
            h = torch.where((context.positions[:, t] == context.num_meta)[:, None, None, None], after_meta, h)
            added = (delta[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None, :]
            h = torch.exp(delta[:, t] * A)[:, :, None, None] * h + added
            outputs.append((h * C[:, t, :, None, :]).sum(-1) + self.D.to(wide)[:, None] * u[:, t])
        return torch.stack(outputs, dim=1).flatten(2)


_OWN: dict[str, type[nn.Module]] = {"mamba2": _Mamba2}
"""Mixers that are neither attention nor Mamba-1."""


def _conv(channels: int, width: int) -> nn.Module:
    conv = nn.Module()
    conv.weight = nn.Parameter(torch.randn(channels, width) * 0.3)
    conv.bias = nn.Parameter(torch.zeros(channels))
    return conv


def _convolve(x: Tensor, conv: nn.Module, context: _Context) -> Tensor:
    """Input of the tap ``distance`` back: the document's own, or that of its meta tokens, or zero before them (2.4)."""
    width = conv.weight.shape[1]
    total = torch.zeros_like(x) + conv.bias.to(x.dtype)
    for distance in range(width):
        position = context.positions - distance
        place = torch.where(position < context.num_meta, position, context.index - distance)
        source = torch.gather(x, 1, place.clamp(min=0)[:, :, None].expand_as(x))
        tap = conv.weight[:, width - 1 - distance].to(x.dtype)
        total = total + torch.where((position >= 0)[:, :, None], source, 0) * tap
    return total


def _rotate(x: Tensor, context: _Context) -> Tensor:
    """RoPE on halves of x [B, T, heads, dk] (2.6)."""
    cos, sin = (t.to(x.dtype)[:, :, None, :].repeat(1, 1, 1, 2) for t in (context.cos, context.sin))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _matrix(config: ModelConfig, rows: int, columns: int) -> nn.Linear:
    linear = nn.Linear(columns, rows, bias=False)
    nn.init.normal_(linear.weight, std=config.init_method_std)
    return linear
