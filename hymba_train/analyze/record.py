"""What the mixers of a Hugging Face model compute, handed out while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_train.hf.modeling_hymba import rotate, wide


@dataclass
class AttentionInputs:
    """Of one layer and one sequence; T = M + S tokens, meta tokens first.

    queries: [T, H, dk], after RoPE and scaled. keys: [G, T, dk], after RoPE. plain_keys: the same before RoPE.
    values: [G, T, dv]. window: as in the layer; None: global. computes_keys: False where they are another layer's.
    """

    layer: int
    num_meta: int
    window: int | None
    computes_keys: bool
    queries: Tensor
    keys: Tensor
    plain_keys: Tensor
    values: Tensor


@dataclass
class ScanInputs:
    """Of one layer and one sequence; T = M + S tokens, meta tokens first. All at least float32.

    u: [T, E], after the convolution. delta: [T, E], after softplus. A: [E, N], negative. B, C: [T, N].
    """

    layer: int
    num_meta: int
    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor


@contextmanager
def recording(
    model: Any,
    on_attention: Callable[[AttentionInputs], None] | None = None,
    on_scan: Callable[[ScanInputs], None] | None = None,
) -> Iterator[None]:
    """While it lasts, every pass of ``model`` over one sequence calls back for every layer, from the first to the last.

    The model is left as it was. Batches of one alone.
    """
    mixers = [layer.mamba for layer in model.model.layers]
    try:
        for mixer in mixers:
            if on_attention is not None and mixer.has_attention:
                mixer._attend = _with_attention(mixer, on_attention)
            if on_scan is not None and mixer.has_ssm:
                mixer._scan = _with_scan(mixer, on_scan)
        yield
    finally:
        for mixer in mixers:
            for name in ("_attend", "_scan"):
                with suppress(KeyError):  # what the instance holds hides the method of its class
                    del mixer.__dict__[name]


def _with_attention(mixer: Any, callback: Callable[[AttentionInputs], None]) -> Callable[..., Tensor]:
    run = mixer._attend

    def attend(q: Tensor, keys: tuple[Tensor, ...], rows: Any) -> Tensor:
        k, v, meta_k, meta_v = keys
        all_keys = torch.cat((meta_k, k[0]), 1)
        cos, sin = rows.cos, rows.sin
        plain_keys = rotate(all_keys.transpose(0, 1), cos, -sin).transpose(0, 1)  # turned back
        callback(
            AttentionInputs(
                mixer.layer_idx, rows.num_meta, mixer.window, mixer.computes_keys, q, all_keys, plain_keys,
                torch.cat((meta_v, v[0]), 1),
            )
        )  # fmt: skip
        return run(q, keys, rows)

    return attend


def _with_scan(mixer: Any, callback: Callable[[ScanInputs], None]) -> Callable[..., Any]:
    run = mixer._scan

    def scan(u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor, state: Any, rows: Any) -> Any:
        A = -torch.exp(mixer.A_log())
        callback(ScanInputs(mixer.layer_idx, rows.num_meta, wide(u), F.softplus(dt), A, wide(B), wide(C)))
        return run(u, dt, B, C, z, state, rows)

    return scan


@contextmanager
def without_meta_tokens(model: Any) -> Iterator[None]:
    """The model runs without its meta tokens while it lasts. RoPE sees distances alone, so positions may shift."""
    number = model.config.num_memory_tokens
    model.config.num_memory_tokens = 0
    try:
        yield
    finally:
        model.config.num_memory_tokens = number
