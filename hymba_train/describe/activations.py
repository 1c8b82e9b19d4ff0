"""Which tensors a layer keeps for its backward pass, by name, for each backend of its ops. Plain Python, no torch.

Counted are storages: a saved view keeps all of its storage alive, and a storage that several steps save counts once,
under one name. tests/describe/test_saved_activations.py holds every list to what autograd really saves. A new backend
gets an entry in :data:`SAVED_BY`; that test names the ones that lack it.

Letters: rows N = M + B*S of the flat token axis; D, E, F, H, R as in :class:`ModelDims`, per tensor-parallel rank
where they are cut. Widths are values per row, means where only some rows have them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from hymba_train.config.schema import ModelConfig
from hymba_train.describe.dims import ModelDims, padded_vocab_size
from hymba_train.describe.heads import heads_of_rank
from hymba_train.describe.stack import LayerDescription
from hymba_train.describe.tensors import capacity, layer_tensors

FLOAT32, INT64, BOOL = 4, 8, 1  # bytes
AUTO_BACKENDS = {
    "cpu": {"attention": "torch", "selective_scan": "torch", "causal_conv": "torch"},
    "cuda": {"attention": "flex", "selective_scan": "cuda", "causal_conv": "torch"},
}
"""What ``auto`` takes where every package is there, the most special backend first (hymba_train.ops.registry)."""
ON_GPU_ONLY = {("attention", "flex"), ("attention", "cudnn"), ("selective_scan", "cuda"), ("selective_scan", "triton")}
DETERMINISTIC_BACKENDS = {"cuda": {"attention": "torch"}}
"""What ``auto`` takes instead with run.deterministic."""
WIDE_STATE_BACKENDS = {"cuda": {"selective_scan": "triton"}}
"""What ``auto`` takes instead with more than MOST_STATES states a channel."""
MOST_STATES = 16
ATTENTION_BLOCK = {"cpu": 64, "cuda": 512}  # queries at a time of attention's torch backend
SCAN_CHUNK = 64  # steps between saved states of the scan in Triton and torch on a GPU
SCAN_TILE = (16, 64)  # tokens and channels of a saved state of the scan in CUDA


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
    documents: bool = True  # segment_ids keep documents apart
    device: str = "cuda"
    backends: Mapping[str, str] = field(default_factory=lambda: AUTO_BACKENDS["cuda"])


def backends_of(
    device: str, deterministic: bool = False, num_states: int = MOST_STATES, asked: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Op -> backend on ``device`` (cpu | cuda); ``asked``: op -> what the configuration says, 'auto' among it."""
    auto = AUTO_BACKENDS[device] | (DETERMINISTIC_BACKENDS.get(device, {}) if deterministic else {})
    auto |= WIDE_STATE_BACKENDS.get(device, {}) if num_states > MOST_STATES else {}
    return auto | {op: name for op, name in (asked or {}).items() if name != "auto"}


class _Layer:
    """Sizes of one layer under one setting, on the tensor-parallel rank with most heads."""

    def __init__(self, model: ModelConfig, layer: LayerDescription, setting: Setting) -> None:
        d = ModelDims.of(model)
        self.description, self.setting = layer, setting
        self.heads = heads_of_rank(d, setting.tensor, setting.tensor - 1)
        self.M, self.B, self.S = d.num_meta_tokens, setting.batch, setting.seq
        self.N = self.M + self.B * self.S
        self.v = setting.value_bytes
        self.dk, self.dv = d.head_dim, d.value_head_dim
        self.H = self.heads.count
        self.E = self.heads.capacity * d.value_head_dim
        self.F = capacity(d.ffn_hidden_size, setting.tensor)
        self.D = d.hidden_size / (setting.tensor if setting.sequence else 1)
        self.whole_D = d.hidden_size
        self.states, self.small = d.state_dim, d.dt_rank + 2 * d.state_dim
        self.taps = d.conv_width - 1
        in_proj = next(t for t in layer_tensors(model, layer) if t.name == "mixer.in_proj.weight")
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

    @property
    def projected(self) -> tuple[str, float]:
        """in_proj's output: its parts are views, so one saved part keeps all of it."""
        return "in_proj.out", self.in_width


Part = Callable[[_Layer], Iterator[SavedTensor]]


def _norm(name: str) -> Part:
    """RMSNorm of the residual stream, and its output, which the linear layer behind it saves."""

    def saved(x: _Layer) -> Iterator[SavedTensor]:
        yield SavedTensor(f"{name}.wide", x.D, FLOAT32)  # in float32 the residual stream itself
        yield SavedTensor(f"{name}.scale", x.D / x.whole_D, FLOAT32)
        yield SavedTensor(f"{name}.normalised", x.D, x.v)
        yield SavedTensor(f"{name}.out", x.D, x.v)

    return saved


def _rope(x: _Layer) -> Iterator[SavedTensor]:
    """cos and sin in the activations' type, for the queries and for the keys made here; in float32 they are shared."""
    if x.is_bf16:
        yield SavedTensor("rope.tables", x.dk * (2 if x.makes_kv else 1), x.v)


def _kv_projection(x: _Layer) -> Iterator[SavedTensor]:
    """Where K/V are projected apart from in_proj (replicated KV heads), from the whole hidden state."""
    if x.makes_kv and not x.kv_in_projection and x.setting.sequence:
        yield SavedTensor("kv_proj.in", x.whole_D, x.v)


def _attention_torch(x: _Layer) -> Iterator[SavedTensor]:
    """Scores of a block of queries against every key that the block reaches: quadratic without a window."""
    window, block = x.description.window, ATTENTION_BLOCK["cpu" if x.setting.device == "cpu" else "cuda"]
    pairs = keys = 0
    for first in range(0, x.S, block):
        last = min(first + block, x.S)
        reached = x.M + last - (0 if window is None else max(0, first - window))
        pairs += (last - first) * reached
        keys += reached
    groups = x.H if x.heads.kv_index else len(x.heads.kv_heads)
    all_pairs, all_keys = x.B * pairs + x.M * x.M, x.B * keys + x.M
    yield SavedTensor("attention.softmax", x.H * all_pairs / x.N, FLOAT32)
    if x.is_bf16:
        yield SavedTensor("attention.weights", x.H * all_pairs / x.N, x.v)
    yield SavedTensor("attention.q", x.H * x.dk, FLOAT32)
    yield SavedTensor("attention.keys", groups * x.dk * all_keys / x.N, FLOAT32)
    text_keys = all_keys - x.M
    if not x.heads.kv_index:  # the meta tokens' values are a view of where they were projected
        if x.makes_kv and x.kv_in_projection:
            yield SavedTensor(*x.projected, x.v)
        elif x.makes_kv:
            yield SavedTensor("kv_proj.v", groups * x.dv, x.v)
    else:
        text_keys = all_keys
    yield SavedTensor("attention.values", groups * x.dv * text_keys / x.N, x.v)
    masks = (x.B if x.setting.documents else 1) * pairs + x.M * x.M
    yield SavedTensor("attention.mask", masks / x.N, BOOL)


def _attention_flex(x: _Layer) -> Iterator[SavedTensor]:
    """The kernel keeps its inputs, its output and one logarithm a query and head. K and V get the meta tokens in
    front; those of the meta tokens' own call are views of where they were made."""
    groups = x.H if x.heads.kv_index else len(x.heads.kv_heads)
    keys = x.B * (x.M + x.S) / x.N
    yield SavedTensor("attention.q", x.H * x.dk, x.v)
    yield SavedTensor("attention.keys", groups * x.dk * keys, x.v)
    yield SavedTensor("attention.values", groups * x.dv * keys, x.v)
    yield SavedTensor("attention.flex_out", x.H * x.dv, x.v)
    yield SavedTensor("attention.log_sum", x.H, FLOAT32)
    if x.makes_kv and x.M and not x.heads.kv_index:
        yield SavedTensor("attention.k_rotated", groups * x.dk, x.v)
        if x.kv_in_projection:
            yield SavedTensor(*x.projected, x.v)
        else:
            yield SavedTensor("kv_proj.v", groups * x.dv, x.v)


def _attention_cudnn(x: _Layer) -> Iterator[SavedTensor]:
    """Text and meta tokens apart, so nothing is put in front; V is copied out of where it was projected."""
    groups = x.H if x.heads.kv_index else len(x.heads.kv_heads)
    yield SavedTensor("attention.q", x.H * x.dk, x.v)
    if x.heads.kv_index:
        yield SavedTensor("attention.keys", groups * x.dk, x.v)
    elif x.makes_kv:
        yield SavedTensor("attention.k_rotated", groups * x.dk, x.v)
    yield SavedTensor("attention.values", groups * x.dv, x.v)
    yield SavedTensor("attention.out", x.H * x.dv, x.v)
    yield SavedTensor("attention.log_sum", x.H, FLOAT32)


def _conv_torch(x: _Layer) -> Iterator[SavedTensor]:
    """Every tap's shifted input in float32, and the sum in front of SiLU."""
    text = x.B * x.S / x.N
    yield from x.wide("conv.input", x.E, x.projected)
    if x.is_bf16 or x.setting.documents:
        in_text = x.taps * x.E
        in_meta = x.taps * x.E if x.is_bf16 else x.E
        yield SavedTensor("conv.past", text * in_text + (1 - text) * in_meta, FLOAT32)
    else:  # views of one padded copy
        yield SavedTensor("conv.past", x.E * (1 + x.taps * (x.B + (1 if x.M else 0)) / x.N), FLOAT32)
    yield SavedTensor("conv.sum", x.E, FLOAT32)
    if x.setting.documents:
        yield SavedTensor("conv.tap_index", x.taps * text, INT64)
        yield SavedTensor("conv.is_inside", x.taps * text, BOOL)


def _scan_torch(x: _Layer) -> Iterator[SavedTensor]:
    yield from x.wide("scan.u", x.E, ("conv.out", x.E))
    yield from x.wide("scan.z", x.E, x.projected)
    yield from x.wide("scan.B_C", 2 * x.states, ("dt_B_C.out", x.small))
    for name in ("softplus_in", "delta", "delta_u", "y", "silu_z"):
        yield SavedTensor(f"scan.{name}", x.E, FLOAT32)
    yield SavedTensor("scan.states", x.E * x.states * _num_states(x, _torch_chunk) / x.N, FLOAT32)


def _torch_chunk(x: _Layer, batch: int) -> int:
    if x.setting.device != "cpu":
        return SCAN_CHUNK
    return min(max(2**20 // max(1, batch * x.E * x.states), 8), 64)


def _num_states(x: _Layer, chunk: Callable[[_Layer, int], int]) -> int:
    """Saved states: one a chunk of each sequence, and of the meta tokens."""
    return x.B * math.ceil(x.S / chunk(x, x.B)) + math.ceil(x.M / chunk(x, 1))


def _scan_reference(x: _Layer) -> Iterator[SavedTensor]:
    """Through autograd, a step at a time: decay and state of every step, and the state that a document may reset."""
    yield from (tensor for tensor in _scan_torch(x) if tensor.name != "scan.states")
    of_text = 3 if x.setting.documents else 2
    every_step = (of_text * x.B * x.S + 2 * x.M) / x.N
    yield SavedTensor("scan.every_step", every_step * x.E * x.states, FLOAT32)


def _scan_triton(x: _Layer) -> Iterator[SavedTensor]:
    yield SavedTensor("scan.dt", x.E, x.v)
    yield SavedTensor("scan.z", x.E, x.v)  # contiguous copies
    yield SavedTensor("scan.B_C", 2 * x.states, FLOAT32)
    num_states = _num_states(x, lambda x, batch: SCAN_CHUNK)
    yield SavedTensor("scan.states", x.E * x.states * num_states / x.N, FLOAT32)
    yield SavedTensor("scan.sum_delta", x.E * num_states / x.N, FLOAT32)


def _scan_cuda(x: _Layer) -> Iterator[SavedTensor]:
    """Reads its inputs where they lie, and keeps the state of every tile of tokens and block of channels, padded."""
    tokens, channels = SCAN_TILE
    tiles = x.B * math.ceil(x.S / tokens) + math.ceil(x.M / tokens)
    yield SavedTensor("scan.dt", x.E, x.v)
    yield SavedTensor(*x.projected, x.v)  # z
    padded = math.ceil(x.E / channels) * channels
    yield SavedTensor("scan.states", padded * MOST_STATES * tiles / x.N, FLOAT32)


def _ssm(x: _Layer) -> Iterator[SavedTensor]:
    """Between convolution and scan: x_proj, the three norms, dt_proj."""
    yield SavedTensor("conv.out", x.E, x.v)
    yield SavedTensor("dt_B_C.wide", x.small, FLOAT32)
    yield SavedTensor("dt_B_C.scale", 3, FLOAT32)
    yield SavedTensor("dt_B_C.normalised", x.small, x.v)
    yield SavedTensor("dt_B_C.out", x.small, x.v)


def _normed_average(x: _Layer) -> Iterator[SavedTensor]:
    for branch in ("attention", "ssm"):
        yield SavedTensor(f"average.{branch}_wide", x.E, FLOAT32)
        yield SavedTensor(f"average.{branch}_normalised", x.E, x.v)
    yield SavedTensor("average.scale", 2, FLOAT32)


def _ffn(x: _Layer) -> Iterator[SavedTensor]:
    yield SavedTensor("ffn.gate_up", 2 * x.F, x.v)
    yield SavedTensor("ffn.silu_gate", x.F, x.v)
    yield SavedTensor("ffn.product", x.F, x.v)


SAVED_BY: dict[tuple[str, str], Part] = {
    ("attention", "torch"): _attention_torch,
    ("attention", "flex"): _attention_flex,
    ("attention", "cudnn"): _attention_cudnn,
    ("causal_conv", "torch"): _conv_torch,
    ("selective_scan", "torch"): _scan_torch,
    ("selective_scan", "cuda"): _scan_cuda,
    ("selective_scan", "triton"): _scan_triton,
    ("selective_scan", "reference"): _scan_reference,
}
"""(op, backend) -> what it saves. Where an op is fused with its neighbours, the entry names all that is left."""


def _parts(x: _Layer) -> Iterator[Part]:
    backends, layer = x.setting.backends, x.description
    yield _norm("input_norm")
    if layer.has_attention:
        yield from (_rope, _kv_projection, SAVED_BY["attention", backends["attention"]])
    if layer.has_ssm:
        yield SAVED_BY["causal_conv", backends["causal_conv"]]
        yield _ssm
        yield SAVED_BY["selective_scan", backends["selective_scan"]]
    if layer.mixer == "hybrid":
        yield _normed_average
    yield lambda x: iter([SavedTensor("out_proj.in", x.E, x.v)])
    if layer.has_ffn:
        yield _norm("ffn_norm")
        yield _ffn


def layer_saved_tensors(model: ModelConfig, layer: LayerDescription, setting: Setting) -> list[SavedTensor]:
    """What one layer keeps for its backward pass, nothing recomputed, on the tensor-parallel rank that keeps most."""
    x = _Layer(model, layer, setting)
    saved: dict[str, SavedTensor] = {}
    for part in _parts(x):
        for tensor in part(x):
            saved[tensor.name] = tensor
    return [tensor for tensor in saved.values() if tensor.width]


def recomputed_saved_tensors(model: ModelConfig, layer: LayerDescription, setting: Setting) -> list[SavedTensor]:
    """What is left of a layer that is recomputed as a whole: its input; in a producer also K, and V as a view of
    where it was projected, because its consumers save them."""
    x = _Layer(model, layer, setting)
    saved = [SavedTensor("layer.in", x.D, x.v)]
    if layer.kv_role == "producer":
        groups = len(x.heads.kv_heads)
        saved.append(SavedTensor("attention.k_rotated", groups * x.dk, x.v))
        width = x.in_width if x.kv_in_projection else groups * x.dv
        saved.append(SavedTensor("in_proj.out" if x.kv_in_projection else "kv_proj.v", width, x.v))
    return saved


def head_saved_tensors(model: ModelConfig, setting: Setting) -> list[SavedTensor]:
    """What final norm, output layer and cross entropy keep. ``logits`` becomes the softmax, in place."""
    d = ModelDims.of(model)
    text = setting.batch * setting.seq
    share = text / (d.num_meta_tokens + text)
    stream = d.hidden_size / (setting.tensor if setting.sequence else 1)
    vocabulary = padded_vocab_size(model, setting.tensor) / setting.tensor
    return [
        SavedTensor("final_norm.wide", stream, FLOAT32),
        SavedTensor("final_norm.scale", stream / d.hidden_size, FLOAT32),
        SavedTensor("final_norm.normalised", stream, setting.value_bytes),
        SavedTensor("final_norm.out", stream, setting.value_bytes),
        SavedTensor("logits", vocabulary * share, FLOAT32),
        SavedTensor("labels", share, INT64),
    ]
