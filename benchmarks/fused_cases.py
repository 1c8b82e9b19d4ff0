"""The fused ops at Hymba-1.5B's widths: inputs, plain and fused functions, bytes, block sizes to try."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hymba_train.ops import causal_conv_triton as conv_module
from hymba_train.ops import cross_entropy_triton as loss_module
from hymba_train.ops import normed_average_triton as average_module
from hymba_train.ops import rms_norm_triton, rope_triton, swiglu_triton
from hymba_train.ops.branch_norms import normed_average
from hymba_train.ops.causal_conv import causal_conv_rows
from hymba_train.ops.causal_conv_triton import causal_conv_rows_triton
from hymba_train.ops.cross_entropy import linear_cross_entropy
from hymba_train.ops.cross_entropy_triton import linear_cross_entropy_triton
from hymba_train.ops.gradient_slots import split_columns, split_rows
from hymba_train.ops.group_rms_norm_triton import group_rms_norm_triton
from hymba_train.ops.normed_average_triton import normed_average_triton
from hymba_train.ops.rms_norm import add_rms_norm, group_rms_norm, rms_norm
from hymba_train.ops.rope import rope_tables, rotate_heads
from hymba_train.ops.segments import rows_reach
from hymba_train.ops.swiglu import swiglu
from hymba_train.ops.swiglu_triton import swiglu_triton as swiglu_fused

D, E, F, HEADS, KV_HEADS, META, EPS = 1600, 3200, 5504, 25, 5, 128, 1e-6
PARTS = [1600, 320, 640, 3200, 3200]  # q, k, v, x, z
GROUPS = [100, 16, 16]  # dt, B, C
VOCAB, PADDED_VOCAB = 32001, 32128
BACKWARD_KNOBS = ("BACKWARD_VALUES", "BACKWARD_STAGES", "BACKWARD_PROGRAMS")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # cpu: with TRITON_INTERPRET=1, the check alone


@dataclass
class Case:
    """One op: inputs, the plain and the fused function of them, and bytes a row (forward, backward)."""

    name: str
    make: Callable[[int, torch.dtype], list[Tensor]]
    plain: Callable
    fused: dict[str, Callable]
    row_bytes: tuple[int, int]
    float32: frozenset[int] = frozenset()  # inputs that are float32 whatever the dtype
    flops_per_row: int = 0  # matrix products, forward
    columns: dict[int, slice] = field(default_factory=dict)  # an input's columns that are the op's
    knobs: list[tuple[object, tuple[str, ...], list[tuple[int, ...]]]] = field(default_factory=list)

    def leaves(self, inputs: list[Tensor]) -> list[Tensor]:
        parts = [x[:, self.columns[i]] if i in self.columns else x for i, x in enumerate(inputs)]
        return [x.detach().requires_grad_() for x in parts]

    def inputs(self, rows: int, dtype: torch.dtype) -> list[Tensor]:
        """Of ``dtype``, but for those that are float32 always."""
        made = self.make(rows, dtype)
        return [x.to(torch.float32 if i in self.float32 else dtype) for i, x in enumerate(made)]


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, device=DEVICE, dtype=torch.float64 if math.prod(shape) < 1e7 else torch.float32)


def documents(rows: int) -> Tensor:
    """Segment ids [4, S] of ``rows`` tokens, documents of 1000 on average (of 20 in the small sizes of the check)."""
    s = (rows - META) // 4
    generator = torch.Generator().manual_seed(1)
    return torch.cumsum((torch.rand(4, s, generator=generator) < (1e-3 if s > 1000 else 5e-2)).long(), 1).to(DEVICE)


def tables(rows: int) -> tuple[Tensor, Tensor]:
    return rope_tables(torch.arange(rows, device=DEVICE), 64, 74534.83)


def conv(function: Callable) -> Callable:
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return function(x, weight, bias, **conv_sizes(x.shape[0]))

    return call


def conv_sizes(rows: int) -> dict:
    if rows not in _reach:
        sizes = dict(num_meta=META, batch=4, seq=(rows - META) // 4, segment_ids=segment_ids(rows))
        _reach[rows] = {**sizes, "reach": rows_reach(*list(sizes.values())[:3], rows, segment_ids(rows), 3, DEVICE)}
    return _reach[rows]


_reach: dict[int, dict] = {}
_ids: dict[int, Tensor] = {}
_tables: dict[int, tuple[Tensor, Tensor]] = {}
_labels: dict[int, Tensor] = {}


def segment_ids(rows: int) -> Tensor:
    if rows not in _ids:
        _ids[rows] = documents(rows)
    return _ids[rows]


def rotation(rows: int) -> tuple[Tensor, Tensor]:
    if rows not in _tables:
        _tables[rows] = tables(rows)
    return _tables[rows]


def labels(rows: int) -> Tensor:
    if rows not in _labels:
        _labels[rows] = torch.randint(0, VOCAB, (rows,), device=DEVICE)
        _labels[rows][::50] = -100
    return _labels[rows]


def parts_plain(projected: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    q, k, v, x, z = projected.split(PARTS, -1)
    rows, cos_sin = projected.shape[0], rotation(projected.shape[0])
    out = causal_conv_rows(x, weight, bias, **conv_sizes(rows))
    pieces = [t for part in (v, z) for t in (part[:META], part[META:])]
    return rotate_heads(q, *cos_sin, HEADS), rotate_heads(k, *cos_sin, KV_HEADS), out, *(p.sigmoid() for p in pieces)


def parts_fused(projected: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    q, k, v, x, z = split_columns(projected, PARTS)
    rows, cos_sin = projected.shape[0], rotation(projected.shape[0])
    out = causal_conv_rows_triton(x, weight, bias, **conv_sizes(rows))
    pieces = [t for part in (v, z) for t in split_rows(part, [META, rows - META])]
    turn = rope_triton.rotate_heads_triton
    return turn(q, *cos_sin, HEADS), turn(k, *cos_sin, KV_HEADS), out, *(p.sigmoid() for p in pieces)


def linear_loss(function: Callable) -> Callable:
    return lambda hidden, weight: function(hidden, weight, labels(hidden.shape[0]), VOCAB)


def conv_inputs(rows: int, dtype: torch.dtype) -> list[Tensor]:
    return [randn(rows, sum(PARTS)), randn(E, 4, scale=0.3), randn(E)]


def cases() -> list[Case]:
    b = 2  # bytes of a bf16 number
    tuned = itertools.product
    norm_knobs = [(rms_norm_triton, BACKWARD_KNOBS, [(16, 3, 5), (16, 2, 6), (16, 1, 6), (32, 3, 6), (32, 1, 6)])]
    average_knobs = [
        (average_module, ("FORWARD_VALUES",), [(16,), (32,), (8,)]),
        (average_module, BACKWARD_KNOBS, [(8, 3, 1), (8, 2, 1), (8, 1, 1), (16, 3, 1), (16, 2, 1), (32, 2, 2)]),
    ]
    conv_knobs = [
        *(
            (conv_module, tuple(f"{pass_}_{name}" for name in ("CHUNK", "CHANNELS", "WARPS", "REGISTERS")), tried)
            for pass_, tried in (
                ("FORWARD", [(64, 128, 1, 128), (64, 256, 2, 128), (64, 64, 1, 64), (128, 64, 1, 64)]),
                ("BACKWARD", [(64, 128, 1, 200), (128, 128, 1, 200), (64, 256, 2, 200), (128, 256, 2, 200),
                              (64, 256, 4, 128), (128, 256, 4, 128), (64, 64, 1, 128)]),
            )
        ),
        (conv_module, ("FINISH_LINES", "FINISH_CHANNELS"), [(32, 32), (64, 32), (128, 32), (64, 64)]),
    ]  # fmt: skip
    rope_knobs = [(rope_triton, ("ROWS", "VALUES_PER_THREAD"), [(2, 8), (1, 8), (4, 8), (2, 4)])]
    loss_knobs = [
        (loss_module, ("FORWARD_BLOCK", "FORWARD_WARPS"), list(tuned([2048, 4096, 8192], [4, 8, 16]))),
        (loss_module, ("BACKWARD_BLOCK", "BACKWARD_WARPS"), list(tuned([1024, 2048, 4096, 8192], [4, 8]))),
    ]
    norm, fused_norm = (lambda x, w: rms_norm(x, w, EPS)), (lambda x, w: rms_norm_triton.rms_norm_triton(x, w, EPS))
    return [
        Case("rms_norm", lambda n, t: [randn(n, D), randn(D)], norm, {"triton": fused_norm},
             (2 * D * b, 3 * D * b), frozenset({1}), knobs=norm_knobs),
        Case("add_rms_norm", lambda n, t: [randn(n, D), randn(n, D), randn(D)],
             lambda r, x, w: add_rms_norm(r, x, w, EPS),
             {"triton": lambda r, x, w: rms_norm_triton.add_rms_norm_triton(r, x, w, EPS)},
             (4 * D * b, 4 * D * b), frozenset({2}), knobs=norm_knobs),
        Case("group_rms_norm", lambda n, t: [randn(n, 132), *(randn(g) for g in GROUPS)],
             lambda x, *w: group_rms_norm(x, w, EPS),
             {"triton": lambda x, *w: group_rms_norm_triton(x, w, EPS)},
             (2 * 132 * b, 3 * 132 * b), frozenset({1, 2, 3})),
        Case("normed_average", lambda n, t: [randn(n, E), randn(n, E), randn(E), randn(E)],
             lambda *x: normed_average(*x, EPS, E), {"triton": lambda *x: normed_average_triton(*x, EPS, E)},
             (3 * E * b, 5 * E * b), frozenset({2, 3}), knobs=average_knobs),
        Case("normed_average, split", lambda n, t: [randn(n, E), randn(n, E), randn(E), randn(E)],
             lambda *x: normed_average(*x, EPS, E, lambda s: None),
             {"triton": lambda *x: normed_average_triton(*x, EPS, E, lambda s: None)},
             (5 * E * b, 8 * E * b), frozenset({2, 3})),
        Case("swiglu", lambda n, t: [randn(n, 2 * F)], swiglu, {"triton": swiglu_fused}, (3 * F * b, 5 * F * b),
             knobs=[(swiglu_triton, ("ROWS", "COLUMNS", "WARPS"), list(tuned([1, 2, 4], [512, 1024], [4, 8])))]),
        Case("conv_rows", conv_inputs, conv(causal_conv_rows), {"triton": conv(causal_conv_rows_triton)},
             (2 * E * b, 3 * E * b), columns={0: slice(2560, 2560 + E)}, knobs=conv_knobs),
        *(Case(f"rope of {name}", lambda n, t: [randn(n, sum(PARTS))],
               lambda x, heads=heads: rotate_heads(x, *rotation(x.shape[0]), heads),
               {"triton": lambda x, heads=heads: rope_triton.rotate_heads_triton(x, *rotation(x.shape[0]), heads)},
               (heads * 256 + 256, heads * 256 + 256), columns={0: slice(first, first + 64 * heads)}, knobs=rope_knobs)
          for name, heads, first in (("q", HEADS, 0), ("k", KV_HEADS, D))),
        Case("in_proj's parts", conv_inputs, parts_plain, {"triton": parts_fused},
             (2 * (D + 320 + E + 640 + E) * b + 320, (2 * (D + 320) + 3 * E + 3 * (640 + E)) * b + 320)),
        Case("linear_cross_entropy", lambda n, t: [randn(n, D), randn(PADDED_VOCAB, D, scale=0.03)],
             linear_loss(linear_cross_entropy),
             {"triton": linear_loss(linear_cross_entropy_triton)},
             (2 * PADDED_VOCAB * b, 4 * PADDED_VOCAB * b), flops_per_row=2 * D * PADDED_VOCAB, knobs=loss_knobs),
    ]  # fmt: skip
