"""What each backend of an op keeps for the backward pass. Plain Python, no torch; put together by
:mod:`hymba_train.describe.activations`.

Counted are storages: a saved view keeps all of its storage alive, and a storage that several steps save counts once,
under one name. A new backend gets an entry in :data:`SAVED_BY`; tests/describe/test_saved_activations.py names the ones
that lack it, and holds the lists to what autograd really saves.

Letters: rows N = M + B*S of the flat token axis; D, E, F, H, R as in :class:`ModelDims`, A the width of all values,
per tensor-parallel rank where they are cut. Widths are values per row, means where only some rows have them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from hymba_train.config.schema import ModelConfig
from hymba_train.describe.dims import ModelDims, padded_vocab_size
from hymba_train.describe.heads import heads_of_rank
from hymba_train.describe.mixers import MIXERS, SsdSizes
from hymba_train.describe.parameters import capacity
from hymba_train.describe.stack import LayerDescription

FLOAT32, INT64, BOOL, FP8 = 4, 8, 1, 1  # bytes
MOST_STATES = 16  # of the scan in CUDA
SCAN_CHUNK = 64  # steps between saved states of the scan in Triton and torch on a GPU
SCAN_TILE = (16, 64)  # tokens and channels of a saved state of the scan in CUDA
GROUP_ALIGNMENT = 16
"""Columns at multiples of which x_proj's dt, B and C start: their matrix products and norms then move 16 bytes of bf16
at a time, which rows of Hymba's 100 + 16 + 16 columns do not allow."""


@dataclass(frozen=True)
class SavedTensor:
    """One storage kept from forward to backward."""

    name: str
    width: float  # values per row
    num_bytes: int  # of a value

    @property
    def bytes_per_row(self) -> float:
        return self.width * self.num_bytes


@dataclass(frozen=True)
class Setting:
    """What a layer's saved tensors depend on besides its description."""

    batch: int  # B, sequences of a micro-batch
    seq: int  # S, text tokens of a sequence
    tensor: int = 1  # tensor-parallel ranks
    sequence: bool = False  # residual stream split over them
    value_bytes: int = 2  # of an activation: 2 in bf16, 4 in float32
    fp8: bool = False  # Transformer Engine computes the large products in FP8
    documents: bool = True  # segment_ids keep documents apart
    device: str = "cuda"
    backends: Mapping[str, str] = field(default_factory=dict)  # op -> backend, all ops of the model


class Sizes:
    """Sizes of one layer under one setting, on the tensor-parallel rank with most heads."""

    def __init__(self, model: ModelConfig, layer: LayerDescription, setting: Setting) -> None:
        d = ModelDims.of(model)
        self.model, self.description, self.setting = model, layer, setting
        self.mixer = MIXERS[layer.mixer]
        self.heads = heads_of_rank(d, setting.tensor, setting.tensor - 1)
        self.M, self.B, self.S = d.num_meta_tokens, setting.batch, setting.seq
        self.N = self.M + self.B * self.S
        self.v = setting.value_bytes
        self.dk, self.dv = d.head_dim, d.value_head_dim
        self.H = self.heads.count
        self.A = self.heads.capacity * d.value_head_dim
        self.E = self.heads.capacity * d.head_channels
        self.F = capacity(d.ffn_hidden_size, setting.tensor)
        self.D = d.hidden_size / (setting.tensor if setting.sequence else 1)
        self.whole_D = d.hidden_size
        self.states, self.small = d.state_dim, d.dt_rank + 2 * d.state_dim
        groups = (d.dt_rank, d.state_dim, d.state_dim)
        self.small_aligned = sum(math.ceil(width / GROUP_ALIGNMENT) * GROUP_ALIGNMENT for width in groups)
        self.taps = d.conv_width - 1
        tensors = {tensor.name: tensor for tensor in self.mixer.tensors(model, layer)}
        out_proj, in_proj = tensors["mixer.out_proj.weight"], tensors["mixer.in_proj.weight"]
        self.out_width = sum(s.part(setting.tensor, 0)[2] * s.unit_size for s in out_proj.slices)
        cut = [s for s in in_proj.slices if not s.is_replicated(setting.tensor)]
        self.in_width = sum(s.part(setting.tensor, 0)[2] * s.unit_size for s in cut)
        self.kv_in_projection = len(cut) == len(in_proj.slices)
        self.makes_kv = layer.has_attention and layer.kv_role != "consumer"

    @property
    def is_bf16(self) -> bool:
        return self.v < FLOAT32

    def wide(self, name: str, width: float, otherwise: tuple[str, float] | None = None) -> Iterator[SavedTensor]:
        """A float32 copy in bf16. In float32 there is none, and what it would copy is saved: ``otherwise``, or it."""
        if self.is_bf16 or otherwise is None:
            yield SavedTensor(name, width, FLOAT32)
        else:
            yield SavedTensor(*otherwise, FLOAT32)

    def kept(self, name: str, width: float) -> SavedTensor:
        """``width`` activations a row."""
        return SavedTensor(name, width, self.v)

    @property
    def ssd(self) -> SsdSizes:
        """Sizes of the SSD scan, of a mixer that has one."""
        sizes = self.mixer.ssd_sizes(self.model)
        assert sizes is not None, self.mixer.name
        return sizes

    @property
    def projected(self) -> tuple[str, float]:
        """in_proj's output: its parts are views, so one saved part keeps all of it."""
        return "in_proj.out", self.in_width


Part = Callable[[Sizes], Iterator[SavedTensor]]
NormPart = Callable[[Sizes, str], Iterator[SavedTensor]]


def norm_torch(x: Sizes, name: str) -> Iterator[SavedTensor]:
    """RMSNorm of the residual stream, and its output, which what comes behind it saves."""
    yield SavedTensor(f"{name}.wide", x.D, FLOAT32)  # in float32 the residual stream itself
    yield SavedTensor(f"{name}.scale", x.D / x.whole_D, FLOAT32)
    yield x.kept(f"{name}.normalised", x.D)
    yield x.kept(f"{name}.out", x.D)


def norm_triton(x: Sizes, name: str) -> Iterator[SavedTensor]:
    yield x.kept(f"{name}.in", x.D)
    yield SavedTensor(f"{name}.scale", x.D / x.whole_D, FLOAT32)
    yield x.kept(f"{name}.out", x.D)


def _rotate_torch(x: Sizes) -> Iterator[SavedTensor]:
    """cos and sin in the activations' type, for the queries and for the keys made here; in float32 they are shared."""
    if x.is_bf16:
        yield x.kept("rope.tables", x.dk * (2 if x.makes_kv else 1))


def nothing(x: Sizes) -> Iterator[SavedTensor]:
    """Its inputs are parameters, or what the whole micro-batch shares."""
    return iter(())


def _conv_torch(x: Sizes) -> Iterator[SavedTensor]:
    """Every tap's shifted input in float32, and the sum in front of SiLU."""
    for name, width, source in x.mixer.convolved(x):
        yield from _conv_of(x, name, width, source)


def _conv_of(x: Sizes, name: str, width: float, source: tuple[str, float]) -> Iterator[SavedTensor]:
    text = x.B * x.S / x.N
    yield from x.wide(f"{name}.input", width, source)
    if x.is_bf16 or x.setting.documents:
        in_text = x.taps * width
        in_meta = x.taps * width if x.is_bf16 else width
        yield SavedTensor(f"{name}.past", text * in_text + (1 - text) * in_meta, FLOAT32)
    else:  # views of one padded copy
        yield SavedTensor(f"{name}.past", width * (1 + x.taps * (x.B + (1 if x.M else 0)) / x.N), FLOAT32)
    yield SavedTensor(f"{name}.sum", width, FLOAT32)
    if x.setting.documents:
        yield SavedTensor(f"{name}.tap_index", x.taps * text, INT64)
        yield SavedTensor(f"{name}.is_inside", x.taps * text, BOOL)


def _conv_triton(x: Sizes) -> Iterator[SavedTensor]:
    for _, _, source in x.mixer.convolved(x):
        yield x.kept(*source)


def _scan_torch(x: Sizes) -> Iterator[SavedTensor]:
    yield from x.wide("scan.u", x.E, ("conv.out", x.E))
    yield from x.wide("scan.z", x.E, x.projected)
    yield from x.wide("scan.B_C", 2 * x.states, ("dt_B_C.out", x.small_aligned))
    for name in ("softplus_in", "delta", "delta_u", "y", "silu_z"):
        yield SavedTensor(f"scan.{name}", x.E, FLOAT32)
    yield SavedTensor("scan.states", x.E * x.states * _num_states(x, _torch_chunk) / x.N, FLOAT32)


def _torch_chunk(x: Sizes, batch: int) -> int:
    if x.setting.device != "cpu":
        return SCAN_CHUNK
    return min(max(2**20 // max(1, batch * x.E * x.states), 8), 64)


def _num_states(x: Sizes, chunk: Callable[[Sizes, int], int]) -> int:
    """Saved states: one a chunk of each sequence, and of the meta tokens."""
    return x.B * math.ceil(x.S / chunk(x, x.B)) + math.ceil(x.M / chunk(x, 1))


def _scan_reference(x: Sizes) -> Iterator[SavedTensor]:
    """Through autograd, a step at a time: decay and state of every step, and the state that a document may reset."""
    yield from (tensor for tensor in _scan_torch(x) if tensor.name != "scan.states")
    of_text = 3 if x.setting.documents else 2
    every_step = (of_text * x.B * x.S + 2 * x.M) / x.N
    yield SavedTensor("scan.every_step", every_step * x.E * x.states, FLOAT32)


def _scan_triton(x: Sizes) -> Iterator[SavedTensor]:
    yield x.kept("scan.dt", x.E)
    yield x.kept("scan.z", x.E)  # contiguous copies
    yield SavedTensor("scan.B_C", 2 * x.states, FLOAT32)
    num_states = _num_states(x, lambda x, batch: SCAN_CHUNK)
    yield SavedTensor("scan.states", x.E * x.states * num_states / x.N, FLOAT32)
    yield SavedTensor("scan.sum_delta", x.E * num_states / x.N, FLOAT32)
    calls = 2 if x.M else 1  # meta tokens and text, each with its own form of exp(A_log), twice
    yield SavedTensor("scan.initial_states", x.E * x.states * (x.B + calls - 1) / x.N, FLOAT32)
    yield SavedTensor("scan.decay", 2 * calls * x.E * x.states / x.N, FLOAT32)


def _scan_cuda(x: Sizes) -> Iterator[SavedTensor]:
    """Reads its inputs where they lie, and keeps the state of every tile of tokens and block of channels, padded."""
    tokens, channels = SCAN_TILE
    tiles = x.B * math.ceil(x.S / tokens) + math.ceil(x.M / tokens)
    yield x.kept("scan.dt", x.E)
    yield x.kept("scan.y", x.E)  # before the gate
    yield x.kept(*x.projected)  # z
    padded = math.ceil(x.E / channels) * channels
    yield SavedTensor("scan.states", padded * MOST_STATES * tiles / x.N, FLOAT32)


def _ssd_torch(x: Sizes) -> Iterator[SavedTensor]:
    """Its inputs: the rest is recomputed. dt is a view of in_proj's output; the documents' numbers are shared."""
    yield x.kept(*x.projected)


def _ssd_reference(x: Sizes) -> Iterator[SavedTensor]:
    """Through autograd, a step at a time: about three copies of the state a step."""
    yield from _ssd_torch(x)
    yield SavedTensor("ssd.every_step", 3 * x.out_width * x.ssd.state_dim, FLOAT32)


def _ssd_mamba_ssm(x: Sizes) -> Iterator[SavedTensor]:
    yield x.kept(*x.projected)
    yield x.kept("ssd.out", x.out_width)
    yield SavedTensor("ssd.decay", x.ssd.num_heads // x.setting.tensor, FLOAT32)


def _group_norm_torch(x: Sizes) -> Iterator[SavedTensor]:
    """The three norms between x_proj and the scan, and their output."""
    yield SavedTensor("dt_B_C.wide", x.small if x.is_bf16 else x.small_aligned, FLOAT32)
    yield SavedTensor("dt_B_C.scale", 3, FLOAT32)
    yield x.kept("dt_B_C.normalised", x.small)
    yield x.kept("dt_B_C.out", x.small_aligned)


def _group_norm_triton(x: Sizes) -> Iterator[SavedTensor]:
    yield x.kept("dt_B_C.in", x.small_aligned)
    yield x.kept("dt_B_C.out", x.small_aligned)


def _average_torch(x: Sizes) -> Iterator[SavedTensor]:
    for branch in ("attention", "ssm"):
        yield SavedTensor(f"average.{branch}_wide", x.E, FLOAT32)
        yield x.kept(f"average.{branch}_normalised", x.E)
    yield SavedTensor("average.scale", 2, FLOAT32)


def _average_triton(x: Sizes) -> Iterator[SavedTensor]:
    yield x.kept("average.attention", x.E)
    yield x.kept("average.ssm", x.E)
    yield SavedTensor("average.sums", 2, FLOAT32)


def _swiglu_torch(x: Sizes) -> Iterator[SavedTensor]:
    yield x.kept("ffn.gate_up", 2 * x.F)
    yield x.kept("ffn.silu_gate", x.F)


def _swiglu_triton(x: Sizes) -> Iterator[SavedTensor]:
    yield x.kept("ffn.gate_up", 2 * x.F)


def loss_torch(model: ModelConfig, setting: Setting) -> SavedTensor:
    """Logarithms of the softmax over the true vocabulary."""
    return SavedTensor("logits", model.vocab_size, FLOAT32)


def loss_triton(model: ModelConfig, setting: Setting) -> SavedTensor:
    """The logits themselves, which become their gradient in place."""
    return SavedTensor("logits", padded_vocab_size(model, 1), setting.value_bytes)


SAVED_BY: dict[str, dict[str, Part]] = {
    "selective_scan": {
        "cuda": _scan_cuda,
        "triton": _scan_triton,
        "torch": _scan_torch,
        "reference": _scan_reference,
    },
    "ssd_scan": {"mamba_ssm": _ssd_mamba_ssm, "torch": _ssd_torch, "reference": _ssd_reference},
    "causal_conv_rows": {"triton": _conv_triton, "torch": _conv_torch},
    "rotate_heads": {"triton": nothing, "torch": _rotate_torch},
    "group_rms_norm": {"triton": _group_norm_triton, "torch": _group_norm_torch},
    "normed_average": {"triton": _average_triton, "torch": _average_torch},
    "swiglu": {"triton": _swiglu_triton, "torch": _swiglu_torch},
}
"""Op -> backend -> what it saves. Where an op is fused with its neighbours, the entry names all that is left. Those of
attention are in :mod:`hymba_train.describe.attention_backends`."""
NORMS: dict[str, dict[str, NormPart]] = {
    "rms_norm": {"triton": norm_triton, "torch": norm_torch},
    "add_rms_norm": {"triton": norm_triton, "torch": norm_torch},
}
"""The same for the norms of the residual stream, of which a layer has two under different names."""
LOSSES: dict[str, Callable[[ModelConfig, Setting], SavedTensor]] = {"triton": loss_triton, "torch": loss_torch}
"""The same for linear_cross_entropy, which one tensor-parallel rank uses."""
