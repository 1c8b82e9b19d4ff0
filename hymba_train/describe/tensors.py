"""Every parameter of a model: name, shape, cut over tensor-parallel ranks, decay, Hugging Face name.

Shapes are the true ones: no padding. A tensor that is cut consists of one or more *slices* along one axis; each slice
has ``units`` pieces of ``unit_size`` rows that stay together (a head, a channel) and is dealt to the ranks by
:func:`partition`.  in_proj of a producer, say, is ::

    | q: 25 x 64 | k: 5 x 64 | v: 5 x 128 | x: 25 x 128 | z: 25 x 128 |     (hymba-architecture 2.3)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

from hymba_train.config.schema import ModelConfig
from hymba_train.describe.dims import ModelDims
from hymba_train.describe.stack import LayerDescription, resolve_stack


@dataclass(frozen=True)
class Slice:
    """A part of a tensor along its cut axis.

    ``kv``: dealt by KV head, or replicated if those do not divide. ``block_multiple``: dealt in equal blocks of a
    multiple of this, all padding on the last ranks (the vocabulary); None: dealt evenly by :func:`partition`.
    """

    name: str
    units: int
    unit_size: int = 1
    kv: bool = False
    block_multiple: int | None = None

    @property
    def size(self) -> int:
        return self.units * self.unit_size

    def is_replicated(self, ranks: int) -> bool:
        """Whether every one of ``ranks`` tensor-parallel ranks holds all of it: KV heads that do not divide."""
        return self.kv and kv_is_replicated(self.units, ranks)

    def part(self, ranks: int, rank: int) -> tuple[int, int, int]:
        """(first, count, capacity) in units, of one rank."""
        if self.block_multiple is None:
            return partition(self.units, ranks, rank)
        capacity = math.ceil(self.units / (self.block_multiple * ranks)) * self.block_multiple
        first = min(rank * capacity, self.units)
        return first, min(capacity, self.units - first), capacity


@dataclass(frozen=True)
class TensorDescription:
    """One parameter. ``axis`` is the axis that tensor parallelism cuts, None if every rank holds it whole."""

    name: str  # ours, below the layer or the model
    shape: tuple[int, ...]
    hf_name: str  # in the published checkpoint (hymba-architecture 4.1), below the layer or the model; '': not there
    axis: int | None = None
    slices: tuple[Slice, ...] = ()
    weight_decay: bool = False
    float32: bool = False  # kept in float32 whatever precision.params says

    @property
    def num_parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def cut_axis(self) -> int:
        """:attr:`axis`, of a tensor that has one."""
        assert self.axis is not None, self.name
        return self.axis


def partition(units: int, ranks: int, rank: int) -> tuple[int, int, int]:
    """(first, count, capacity): units that ``rank`` really holds, and room per rank (count or count + 1; rest zero).

    >>> [partition(25, 2, r) for r in (0, 1)]
    [(0, 12, 13), (12, 13, 13)]
    """
    first, last = units * rank // ranks, units * (rank + 1) // ranks
    return first, last - first, capacity(units, ranks)


def capacity(units: int, ranks: int) -> int:
    """Room for units on each rank, zero padding included: what :func:`partition` gives every rank alike."""
    return math.ceil(units / ranks)


def kv_is_replicated(num_kv_heads: int, tensor_size: int) -> bool:
    """Whether every tensor-parallel rank holds the K/V projections of all KV heads: their number does not divide."""
    return num_kv_heads % tensor_size != 0


def layer_tensors(model: ModelConfig, layer: LayerDescription) -> list[TensorDescription]:
    """Parameters of one layer, names below ``decoder.layers.{i}.`` (``model.layers.{i}.`` in Hugging Face)."""
    d = ModelDims.of(model)
    tensors = [_norm("input_norm.weight", d.hidden_size, "input_layernorm.weight")]
    tensors += _mamba2_tensors(d) if layer.mixer == "mamba2" else _mixer_tensors(model, d, layer)
    if layer.has_ffn:
        f = Slice("f", d.ffn_hidden_size)
        tensors += [
            _norm("ffn_norm.weight", d.hidden_size, "pre_moe_layernorm.weight"),
            TensorDescription(
                "ffn.linear_fc1.weight", (2 * d.ffn_hidden_size, d.hidden_size),
                "moe.experts.0.{gate_proj,up_proj}.weight", 0,
                (Slice("gate", d.ffn_hidden_size), Slice("up", d.ffn_hidden_size)), True,
            ),
            TensorDescription(
                "ffn.linear_fc2.weight", (d.hidden_size, d.ffn_hidden_size), "moe.experts.0.down_proj.weight", 1,
                (f,), True,
            ),
        ]  # fmt: skip
    return tensors


class _Cut(TypedDict):
    axis: int
    slices: tuple[Slice, ...]


def _norm(name: str, size: int, hf: str) -> TensorDescription:
    return TensorDescription(name, (size,), hf, float32=True)


def _mixer_tensors(model: ModelConfig, d: ModelDims, layer: LayerDescription) -> list[TensorDescription]:
    """Attention, Mamba-1, or both side by side."""
    heads = d.num_heads
    values, channels = Slice("values", heads, d.value_head_dim), Slice("channels", heads, d.head_channels)
    proj = []
    if layer.has_attention:
        proj.append(Slice("q", heads, d.head_dim))
        if layer.kv_role != "consumer":
            proj += [
                Slice("k", d.num_kv_heads, d.head_dim, kv=True),
                Slice("v", d.num_kv_heads, d.value_head_dim, kv=True),
            ]
    if layer.has_ssm:
        proj += [Slice("x", heads, d.head_channels), Slice("z", heads, d.head_channels)]
    rows = sum(s.size for s in proj)
    tensors = [
        TensorDescription("mixer.in_proj.weight", (rows, d.hidden_size), "mamba.in_proj.weight", 0, tuple(proj), True)
    ]
    if layer.has_ssm:
        e, n, r = d.inner_size, d.state_dim, d.dt_rank
        cut = _Cut(axis=0, slices=(channels,))
        tensors += [
            TensorDescription("mixer.conv.weight", (e, d.conv_width), "mamba.conv1d.weight", **cut),
            TensorDescription("mixer.conv.bias", (e,), "mamba.conv1d.bias", **cut),
            TensorDescription("mixer.x_proj.weight", (r + 2 * n, e), "mamba.x_proj.0.weight", 1, (channels,), True),
            _norm("mixer.dt_norm.weight", r, "mamba.dt_layernorm.weight"),
            _norm("mixer.B_norm.weight", n, "mamba.B_layernorm.weight"),
            _norm("mixer.C_norm.weight", n, "mamba.C_layernorm.weight"),
            TensorDescription("mixer.dt_proj.weight", (e, r), "mamba.dt_proj.0.weight", 0, (channels,), True),
            TensorDescription("mixer.dt_bias", (e,), "mamba.dt_proj.0.bias", **cut, float32=True),
            TensorDescription("mixer.A_log", (e, n), "mamba.A_log.0", **cut, float32=True),
            TensorDescription("mixer.D", (e,), "mamba.D.0", **cut, float32=True),
        ]
    if layer.mixer == "hybrid":
        for branch, piece, number in (("attention", values, 1), ("ssm", channels, 2)):
            tensors.append(
                TensorDescription(
                    f"mixer.{branch}_norm.weight", (piece.size,), f"mamba.pre_avg_layernorm{number}.weight",
                    0, (piece,), float32=True,
                )
            )  # fmt: skip
    out = out_proj_slices(model, layer)
    width = sum(s.size for s in out)
    tensors.append(
        TensorDescription("mixer.out_proj.weight", (d.hidden_size, width), "mamba.out_proj.weight", 1, out, True)
    )
    return tensors


def out_proj_slices(model: ModelConfig, layer: LayerDescription) -> tuple[Slice, ...]:
    """Columns of out_proj: what the mixer puts out, by branch where both are kept apart."""
    d = ModelDims.of(model)
    values, channels = Slice("values", d.num_heads, d.value_head_dim), Slice("channels", d.num_heads, d.head_channels)
    if layer.mixer == "hybrid" and model.branch_fusion == "concat":
        return values, channels
    return (channels,) if layer.has_ssm else (values,)


def _mamba2_tensors(d: ModelDims) -> list[TensorDescription]:
    """Mamba-2 (arXiv 2405.21060, section 7). B and C belong to groups of heads, of which there may be one alone: every
    rank computes all of them from weights that it holds whole. Not in the published format: no names there."""
    e, heads, bc = d.inner_size, d.mamba2_num_heads, d.mamba2_bc_size
    channels, per_head = Slice("channels", heads, d.mamba2_head_dim), Slice("heads", heads)
    proj = (Slice("x", heads, d.mamba2_head_dim), Slice("z", heads, d.mamba2_head_dim), Slice("dt", heads))
    cut, one_a_head = _Cut(axis=0, slices=(channels,)), _Cut(axis=0, slices=(per_head,))
    return [
        TensorDescription("mixer.in_proj.weight", (2 * e + heads, d.hidden_size), "", 0, proj, True),
        TensorDescription("mixer.bc_proj.weight", (bc, d.hidden_size), "", weight_decay=True),
        TensorDescription("mixer.conv.weight", (e, d.conv_width), "", **cut),
        TensorDescription("mixer.conv.bias", (e,), "", **cut),
        TensorDescription("mixer.bc_conv.weight", (bc, d.conv_width), ""),
        TensorDescription("mixer.bc_conv.bias", (bc,), ""),
        TensorDescription("mixer.dt_bias", (heads,), "", **one_a_head, float32=True),
        TensorDescription("mixer.A_log", (heads,), "", **one_a_head, float32=True),
        TensorDescription("mixer.D", (heads,), "", **one_a_head, float32=True),
        TensorDescription("mixer.gated_norm.weight", (e,), "", **cut, float32=True),
        TensorDescription("mixer.out_proj.weight", (d.hidden_size, e), "", 1, (channels,), True),
    ]


def model_tensors(model: ModelConfig) -> list[TensorDescription]:
    """Every parameter of the model, full names, in forward order."""
    before, after = end_tensors(model)
    tensors = list(before)
    for layer in resolve_stack(model):
        for t in layer_tensors(model, layer):
            name, hf = f"decoder.layers.{layer.index}.{t.name}", f"model.layers.{layer.index}.{t.hf_name}"
            tensors.append(TensorDescription(name, t.shape, hf, t.axis, t.slices, t.weight_decay, t.float32))
    return [*tensors, *after]


def end_tensors(model: ModelConfig) -> tuple[list[TensorDescription], list[TensorDescription]]:
    """Parameters before the layers and after them, full names. A tied output layer has none of its own."""
    d = ModelDims.of(model)
    vocab = (Slice("vocab", d.vocab_size, block_multiple=model.make_vocab_size_divisible_by),)
    embedding = (d.vocab_size, d.hidden_size)
    before = [
        TensorDescription("embedding.word_embeddings.weight", embedding, "model.embed_tokens.weight", 0, vocab, True)
    ]
    if d.num_meta_tokens:
        shape = (d.num_meta_tokens, d.hidden_size)
        before.append(TensorDescription("embedding.meta_tokens", shape, "model.memory_tokens"))
    after = [TensorDescription("final_norm.weight", (d.hidden_size,), "model.final_layernorm.weight", float32=True)]
    if model.untie_embeddings_and_output_weights:
        after.append(TensorDescription("output_layer.weight", embedding, "lm_head.weight", 0, vocab, True))
    return before, after
