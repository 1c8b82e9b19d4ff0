"""Backends of the ops: what each can do, and the choice of one when the model is built.

An op has one signature and several backends. :func:`select` picks one, once; nothing falls back later. The object it
returns is called like the op itself, and its :attr:`Choice.description` is the line to print.

    scan = select("selective_scan", "auto", "cpu", needs={"segment_ids"}, dtype=torch.float32)
    y, state = scan(u, dt, A_log, B, C, D, dt_bias, z, initial_state=None, segment_ids=segment_ids)
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from hymba_train.errors import UserError

NEEDS = {
    "backward": "gradients",
    "segment_ids": "documents kept apart by segment_ids",
    "initial_state": "an initial state or initial taps",
    "state_grad": "gradients to the initial and through the final state",
    "kv_index": "a table from query head to KV head",
    "deterministic": "bitwise equal gradients from run to run",
    "wide_state": "more than 16 states a channel",
    "odd_width": "heads whose width is no power of two",
}
"""What a caller may ask of a backend, and how an error says it."""

DTYPE_NAMES = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ALL_DTYPES = frozenset(DTYPE_NAMES)


def is_importable(package: str) -> bool:
    """Whether a package is installed; it is looked for, not imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # a.b without a
        return False


@dataclass(frozen=True)
class Backend:
    """One implementation of an op. ``target`` is 'module:function', imported when first called or selected.

    ``requires`` are Python packages that must be importable. ``can`` is a subset of :data:`NEEDS`.
    ``capability`` is the least compute capability of a CUDA device; looked at only where there is one.
    """

    op: str
    name: str
    target: str
    device_types: frozenset[str]
    can: frozenset[str]
    dtypes: frozenset[torch.dtype] = ALL_DTYPES
    requires: tuple[str, ...] = ()
    capability: tuple[int, int] = (0, 0)

    def obstacles(self, device_type: str, needs: Collection[str], dtype: torch.dtype | None) -> list[str]:
        """Why this backend cannot do what is asked; empty if it can."""
        found = [f"needs the package {p}" for p in self.requires if not is_importable(p)]
        if device_type not in self.device_types:
            found.append(f"runs on {' and '.join(sorted(self.device_types))}, not on {device_type}")
        if dtype is not None and dtype not in self.dtypes:
            found.append(f"has no {DTYPE_NAMES.get(dtype, dtype)}")
        if device_type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < self.capability:
            found.append(f"needs compute capability {self.capability}, not {torch.cuda.get_device_capability()}")
        return found + [f"has no {NEEDS[need]}" for need in sorted(set(needs) - self.can)]

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Choice:
    """A selected backend: callable with the op's own signature."""

    backend: Backend
    device_type: str
    reason: str

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def description(self) -> str:
        return f"{self.backend.op}: {self.backend.name} on {self.device_type} ({self.reason})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.backend.function(*args, **kwargs)

    def signature(self) -> inspect.Signature:
        return inspect.signature(self.backend.function)


_STATE = frozenset({"backward", "segment_ids", "initial_state", "state_grad"})
_DETERMINISTIC = _STATE | {"deterministic"}
_ANY_STATE = _DETERMINISTIC | {"wide_state"}
_ATTENTION = frozenset({"backward", "segment_ids", "kv_index"})
_HALF_AND_SINGLE = frozenset({torch.float32, torch.bfloat16, torch.float16})
_BF16_AND_SINGLE = frozenset({torch.float32, torch.bfloat16})
_ANY = frozenset({"cpu", "cuda"})
_CUDA = frozenset({"cuda"})
_HERE = "hymba_train.ops"


def _pair(op: str, triton: str, torch: str) -> tuple[Backend, Backend]:
    """A Triton backend, of half and single precision on a GPU, and the plain one, of any kind anywhere."""
    return (
        Backend(op, "triton", f"{_HERE}.{triton}", _CUDA, _DETERMINISTIC, _HALF_AND_SINGLE, requires=("triton",)),
        Backend(op, "torch", f"{_HERE}.{torch}", _ANY, _DETERMINISTIC | {"odd_width"}),
    )


# For each op, the preferred backend first: 'auto' takes the first that can do what is asked.
BACKENDS: dict[str, tuple[Backend, ...]] = {
    "attention": (
        Backend(
            "attention", "cudnn", f"{_HERE}.attention_cudnn:attention_cudnn", _CUDA, _ATTENTION | {"deterministic"},
            frozenset({torch.bfloat16, torch.float16}), requires=("transformer_engine", "triton"),
        ),
        Backend("attention", "flex", f"{_HERE}.attention_flex:attention_flex", _CUDA, _ATTENTION, _HALF_AND_SINGLE),
        Backend("attention", "torch", f"{_HERE}.attention:attention", _ANY, _ATTENTION | {"deterministic"}),
    ),
    "selective_scan": (
        Backend(
            "selective_scan", "cuda", f"{_HERE}.selective_scan_cuda:selective_scan_cuda", _CUDA, _DETERMINISTIC,
            _BF16_AND_SINGLE, requires=("cuda.bindings",), capability=(8, 0),
        ),
        Backend(
            "selective_scan", "triton", f"{_HERE}.selective_scan_triton:selective_scan_triton", _CUDA, _ANY_STATE,
            _HALF_AND_SINGLE, requires=("triton",),
        ),
        Backend("selective_scan", "torch", f"{_HERE}.selective_scan:selective_scan", _ANY, _ANY_STATE),
        Backend("selective_scan", "reference", f"{_HERE}.selective_scan:selective_scan_reference", _ANY, _ANY_STATE),
    ),
    "ssd_scan": (
        Backend(
            "ssd_scan", "mamba_ssm", f"{_HERE}.ssd_scan_mamba_ssm:ssd_scan_mamba_ssm", _CUDA, _STATE,
            frozenset({torch.bfloat16, torch.float16}), requires=("mamba_ssm",),
        ),
        Backend("ssd_scan", "torch", f"{_HERE}.ssd_scan:ssd_scan", _ANY, _DETERMINISTIC),
        Backend("ssd_scan", "reference", f"{_HERE}.ssd_scan:ssd_scan_reference", _ANY, _DETERMINISTIC),
    ),
    "causal_conv_rows": _pair(
        "causal_conv_rows", "causal_conv_triton:causal_conv_rows_triton", "causal_conv:causal_conv_rows"
    ),
    "rms_norm": _pair("rms_norm", "rms_norm_triton:rms_norm_triton", "rms_norm:rms_norm"),
    "add_rms_norm": _pair("add_rms_norm", "rms_norm_triton:add_rms_norm_triton", "rms_norm:add_rms_norm"),
    "group_rms_norm": _pair(
        "group_rms_norm", "group_rms_norm_triton:group_rms_norm_triton", "rms_norm:group_rms_norm"
    ),
    "normed_average": _pair(
        "normed_average", "normed_average_triton:normed_average_triton", "branch_norms:normed_average"
    ),
    "swiglu": _pair("swiglu", "swiglu_triton:swiglu_triton", "swiglu:swiglu"),
    "rotate_heads": _pair("rotate_heads", "rope_triton:rotate_heads_triton", "rope:rotate_heads"),
    "linear_cross_entropy": _pair(
        "linear_cross_entropy", "cross_entropy_triton:linear_cross_entropy_triton", "cross_entropy:linear_cross_entropy"
    ),
}  # fmt: skip


def select(
    op: str, name: str, device_type: str, *, needs: Collection[str] = (), dtype: torch.dtype | None = None
) -> Choice:
    """The backend ``name`` of ``op`` ('auto': the first, in order of preference, that can do what is asked).

    ``device_type`` is 'cpu' or 'cuda'; ``needs`` are keys of :data:`NEEDS`; ``dtype`` is that of the activations.
    Raises UserError, naming the nearest backend that can, if the one asked for does not exist or cannot; ValueError
    for an op or a need that is not known.
    """
    unknown = set(needs) - set(NEEDS)
    if op not in BACKENDS or unknown:
        raise ValueError(f"select({op!r}, needs={sorted(needs)}): ops are {list(BACKENDS)}, needs are {list(NEEDS)}")
    backends = BACKENDS[op]
    obstacles = {b.name: b.obstacles(device_type, needs, dtype) for b in backends}
    able = [b for b in backends if not obstacles[b.name]]
    advice = f"use {able[0].name!r}" if able else f"no backend of {op} can do this on {device_type}"
    if name == "auto":
        if not able:
            raise UserError(f"{op}: {advice}: " + "; ".join(f"{n} {', '.join(o)}" for n, o in obstacles.items()))
        passed = [f"{b.name} {', '.join(obstacles[b.name])}" for b in backends[: backends.index(able[0])]]
        return Choice(able[0], device_type, "; ".join(["auto", *passed]))
    if name not in obstacles:
        raise UserError(f"{op}: there is no backend {name!r}; known are {', '.join(obstacles)} and auto; {advice}")
    if obstacles[name]:
        raise UserError(f"{op}: backend {name!r} {', '.join(obstacles[name])}; {advice}")
    return Choice(next(b for b in backends if b.name == name), device_type, "as asked")
