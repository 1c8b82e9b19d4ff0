"""Timing of optimizer steps and kernels on a GPU, and the one line of JSON by which a contender reports."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

import torch

from hymba_train.errors import UserError


@dataclass(frozen=True)
class Result:
    """One contender at one micro-batch on each of ``gpus``. ``parts``: GPU milliseconds of a step by part, if profiled
    (of rank 0)."""

    contender: str
    micro_batch: int
    seq_length: int
    step_ms: float
    tokens_per_second: float  # and GPU
    flops_per_token: float  # forward and backward, FLOP
    peak_gib: float
    loss: float
    parts: dict[str, float] = field(default_factory=dict)
    gpus: int = 1

    @property
    def tokens(self) -> float:
        """In a step, of each GPU."""
        return self.tokens_per_second * self.step_ms / 1e3

    def mfu(self, peak_flops: float) -> float:
        return self.tokens_per_second * self.flops_per_token / peak_flops

    def report(self) -> None:
        print(json.dumps(asdict(self)), flush=True)


def need_gpu(name: str, hint: str = "") -> None:
    """Raises UserError on a machine without one."""
    if not torch.cuda.is_available():
        raise UserError(f"hymba bench {name}: no GPU here{hint}")


def time_steps(step: Callable[[], torch.Tensor], warm_up: int, repeats: int) -> tuple[float, float, float]:
    """(median milliseconds of ``step`` by CUDA events, peak memory allocated in GiB, last loss)."""
    for _ in range(warm_up):
        loss = step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        loss = step()
        mark.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    return times[len(times) // 2], torch.cuda.max_memory_allocated() / 2**30, float(loss)


def milliseconds(run: Callable[[Any], object], inputs: Sequence[Any], repeats: int = 12) -> float:
    """Of one ``run``, whose inputs take turns. On a GPU by CUDA events, in a queue that the host fills ahead."""
    for one in inputs:
        run(one)
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        for i in range(repeats):
            run(inputs[i % len(inputs)])
        return (time.perf_counter() - begin) / repeats * 1000
    torch.cuda.synchronize()
    busy = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(40):  # some 50 ms of work, so that the queue below is full when its first call starts
        busy @ busy
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for i in range(repeats):
        run(inputs[i % len(inputs)])
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def profiled_kernels(run: Callable[[], object]) -> list[Any]:
    """Averages by torch of each kernel in ``run``: ``key``, ``count``, ``device_time_total`` in microseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    return [e for e in profiled.key_averages() if e.device_time_total > 0]


@contextlib.contextmanager
def settings(module: ModuleType, values: Mapping[str, Any]) -> Iterator[None]:
    """Constants of a module that have other values for a while."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
