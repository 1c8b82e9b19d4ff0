"""Timing of optimizer steps on a GPU, and the one line of JSON by which a contender reports."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch


@dataclass(frozen=True)
class Result:
    """One contender at one micro-batch. ``parts``: GPU milliseconds of a step by part, where it was profiled."""

    contender: str
    micro_batch: int
    seq_length: int
    step_ms: float
    tokens_per_second: float
    flops_per_token: float  # forward and backward, FLOP
    peak_gib: float
    loss: float
    parts: dict[str, float] = field(default_factory=dict)

    def mfu(self, peak_flops: float) -> float:
        return self.tokens_per_second * self.flops_per_token / peak_flops

    def report(self) -> None:
        print(json.dumps(asdict(self)), flush=True)


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
