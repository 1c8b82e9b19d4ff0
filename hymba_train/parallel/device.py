"""Which device a process computes on, and what Megatron-Core needs to run on a CPU.

:func:`activate` is called once a process, before anything of ``megatron.core`` is built. On a machine with a GPU it
picks the device and changes nothing else. On a CPU it installs :data:`CPU_OVERRIDES`: Megatron-Core's train path names
"cuda" as the device of its small bookkeeping tensors, so a short list of named overrides puts those on the CPU and the
collectives on gloo. Nothing of Megatron-Core is copied. Each override carries its reason;
tests/parallel/test_device.py shows that a train step with checkpoint fails, or goes wrong, without it.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hymba_train.errors import UserError

_active: torch.device | None = None


def resolve_device(wanted: str) -> torch.device:
    """``auto | cpu | cuda`` -> this process's device (cuda: the GPU of LOCAL_RANK).

    Raises UserError if cuda is asked for and there is none.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(f"run.device={wanted!r}: known are auto, cpu, cuda")
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("run.device=cuda, but torch sees no GPU: use run.device=cpu, or check the driver")
    local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise UserError(
            f"LOCAL_RANK={local_rank}, but this machine has {num_gpus} GPU(s): start at most {num_gpus} processes, "
            "or use run.device=cpu"
        )
    return torch.device("cuda", local_rank)


def activate(wanted: str = "auto", skip: tuple[str, ...] = ()) -> torch.device:
    """Prepare this process once and return its device. ``skip`` leaves overrides out (for tests)."""
    global _active
    device = resolve_device(wanted)
    if _active is not None:
        if _active.type != device.type:
            raise UserError(f"run.device: this process runs on {_active.type} already and cannot move to {device.type}")
        return _active
    if device.type == "cpu":
        for override in CPU_OVERRIDES:
            if override.name not in skip:
                override.install()
    else:
        torch.cuda.set_device(device)
    _active = device
    return device


def backend(device: torch.device) -> str:
    """torch.distributed backend of a device type."""
    return "gloo" if device.type == "cpu" else "nccl"


@dataclass(frozen=True)
class Override:
    """One change to make Megatron-Core run on a CPU."""

    name: str
    reason: str
    install: Callable[[], None]


def _disable_compile() -> None:
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    import torch._dynamo.config

    torch._dynamo.config.disable = True


def _cpu_factories() -> None:
    def on_cpu(factory: Callable) -> Callable:
        @functools.wraps(factory)
        def wrapped(*args, **kwargs):
            if torch.device(kwargs.get("device") or "cpu").type == "cuda":
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        return wrapped

    # A TorchFunctionMode would be neater, but backward() runs with the mode switched off, recomputation included.
    for name in ("zeros", "ones", "tensor"):
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _tensor_type() -> None:
    plain = torch.Tensor.type

    def type_(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        if isinstance(out, str) and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core."):
            out = out.replace("torch.", "torch.cuda.", 1)
        return out

    torch.Tensor.type = type_


def _tensor_cuda() -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


class _NoStream:
    """Stands for the one stream that a CPU has."""

    cuda_stream = 0

    def wait_stream(self, other) -> None: ...
    def wait_event(self, event) -> None: ...
    def synchronize(self) -> None: ...


def _cuda_calls() -> None:
    table = {
        "current_device": lambda: torch.device("cpu"),  # only ever used as device=...
        "synchronize": lambda *args: None,
        "current_stream": lambda *args: _NoStream(),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
    }
    for name, function in table.items():
        setattr(torch.cuda, name, function)


def _rng_helpers() -> None:
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    # fork() warns that the CPU generator changed inside it; here that is its very purpose.
    logging.getLogger(random.__name__).addFilter(lambda r: "CPU RNG state changed" not in r.getMessage())


CPU_OVERRIDES: tuple[Override, ...] = (
    Override(
        "compile", "jit_fuser is torch.compile, which needs a C++ compiler and minutes on a CPU", _disable_compile
    ),
    Override("factories", "schedules, optimizer and clip_grads create tensors with device='cuda'", _cpu_factories),
    Override("tensor_type", "the optimizers and clip_grads compare Tensor.type() with 'torch.cuda.*'", _tensor_type),
    Override("tensor_cuda", "optimizer and tied embeddings call Tensor.cuda()", _tensor_cuda),
    Override(
        "cuda_calls",
        "current_device() is used as device=, p2p and checkpoint writers synchronize, the overlap code asks for the "
        "current stream, seeding and recomputation use the CUDA generator, whose stand-in is the CPU generator",
        _cuda_calls,
    ),
    Override("rng_helpers", "tensor_parallel.random keeps private helpers on the CUDA generator", _rng_helpers),
)
