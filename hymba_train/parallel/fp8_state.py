"""The memory of FP8's delayed scaling: scales and amax histories, which Transformer Engine keeps beside the weights.

A product casts by a scale that comes from the largest values of earlier micro-batches, so these tensors are part of a
run's state, as moments are: checkpoints hold them; a step that is run again starts from what it started from the first
time; evaluation, which Transformer Engine lets write into the newest row of the history, leaves no trace.

Everything is done in place: Transformer Engine's quantizers, and the buffers of its reductions, are views of these
tensors. After each reduction they are equal on all ranks of a pipeline stage, so that they fit every layout. Works on
any module with ``fp8_meta``; the other recipes have no memory, and there is nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

DIRECTIONS = {"fwd": "scaling_fwd", "bwd": "scaling_bwd"}
KINDS = ("scale", "amax_history")


class Fp8State:
    """Of ``modules``, by name. Without any that has a memory, every method does nothing."""

    def __init__(self, modules: dict[str, Any]) -> None:
        self.modules = modules
        self._remembered: list[Tensor] = []

    @classmethod
    def of(cls, models: Iterable[Any]) -> Fp8State:
        """Of all layers of some model chunks (HymbaModel)."""
        return cls({name: module for model in models for name, module in _modules(model)})

    def tensors(self) -> dict[str, Tensor]:
        """'decoder.layers.3.mixer.in_proj.scale_fwd' -> the tensor itself: float32 [n] scales, [history, n] amaxes."""
        found = {}
        for name, module in self.modules.items():
            for direction, key in DIRECTIONS.items():
                state = module.fp8_meta.get(key)
                for kind in KINDS:
                    tensor = getattr(state, kind, None)
                    if tensor is not None:
                        found[f"{name}.{kind}_{direction}"] = tensor
        return found

    @torch.no_grad()
    def remember(self) -> None:
        """Keep a copy for :meth:`go_back`, in place of the one before. Does not make the host wait."""
        live = list(self.tensors().values())
        if [t.shape for t in live] != [t.shape for t in self._remembered]:
            self._remembered = [torch.empty_like(t) for t in live]
        if live:
            torch._foreach_copy_(self._remembered, live)

    @torch.no_grad()
    def go_back(self) -> None:
        """To what was remembered last."""
        if self._remembered:
            torch._foreach_copy_(list(self.tensors().values()), self._remembered)

    @torch.no_grad()
    def reset(self) -> None:
        """To that of a run which begins: scales of one, empty histories."""
        for name, tensor in self.tensors().items():
            tensor.fill_(1.0 if ".scale_" in name else 0.0)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """What runs inside leaves no trace."""
        live = list(self.tensors().values())
        before = [t.clone() for t in live]
        try:
            yield
        finally:
            if live:
                with torch.no_grad():
                    torch._foreach_copy_(live, before)


def prepare(models: Iterable[Any]) -> None:
    """Have the memory there before the first forward pass, which would make it, so that a checkpoint can fill it."""
    for model in models:
        if not model.config.fp8:
            continue
        from megatron.core.fp8_utils import get_fp8_context

        with torch.no_grad(), get_fp8_context(model.config):  # with gradients, leaving it would move the histories
            for _, module in _modules(model):
                module.init_fp8_metadata(num_gemms=1)


def cast_weights(models: Iterable[Any]) -> list[Tensor]:
    """What Transformer Engine keeps of weights cast to FP8, as it stands. An evaluation takes the transposed ones away,
    and the next forward pass that trains makes others."""
    held = [cast for model in models for _, module in _modules(model) for cast in module._fp8_workspaces.values()]
    parts = [getattr(cast, name, None) for cast in held for name in ("_data", "_transpose", "_scale_inv")]
    return [part for part in parts if part is not None]


def _modules(model: Any) -> Iterator[tuple[str, Any]]:
    """(name with the layer's global number, module) of everything that may have such a memory."""
    for name, module in model.named_modules():
        if hasattr(module, "fp8_meta"):
            head, layers, rest = name.partition("decoder.layers.")
            if layers:
                position, dot, below = rest.partition(".")
                name = f"{head}{layers}{model.decoder.layers[int(position)].layer.index}{dot}{below}"
            yield name, module
