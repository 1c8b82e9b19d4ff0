"""Ranks that are slow by themselves, found without asking: each one's figure travels with the next step's loss.

All ranks take equally long over a step, because they wait for each other. What is compared is each rank's own time: for
data, and from the start of its forward pass to the moment when it would reduce gradients over the data-parallel ranks.
Waiting for tensor-parallel neighbours and pipeline stages is part of it, so a slow rank makes its whole
tensor-and-pipeline group look slow; that group is named.
"""

from __future__ import annotations

import socket
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from hymba_train.callbacks.base import Callback
from hymba_train.parallel.runtime import Runtime
from hymba_train.train.loop import Loop
from hymba_train.train.metrics import StepMetrics

MIN_STEPS = 10  # steps behind a figure
WARM_UP_STEPS = 2  # of a process: kernels are compiled, caches are cold


class Stragglers(Callback):
    """On every rank. ``seconds`` is this rank's own time in its latest step, to be handed to the next one.

    ``settings`` is the chunks' configuration object, through which Megatron-Core calls what finishes gradients.
    """

    def __init__(self, runtime: Runtime, settings: Any, ratio: float) -> None:
        self.runtime, self.ratio = runtime, ratio
        self.seconds = 0.0
        self._gpu = runtime.device.type == "cuda"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._gpu else []
        self._begun = self._loaded = self._ready = 0.0
        self._sums: list[float] = []
        self._steps = -WARM_UP_STEPS
        self._hosts: list[str] = [""] * runtime.world_size
        dist.all_gather_object(self._hosts, socket.gethostname())
        finish = settings.finalize_model_grads_func

        def finalize_model_grads(*args: Any, **kwargs: Any) -> None:
            self._mark_ready()
            finish(*args, **kwargs)

        settings.finalize_model_grads_func = finalize_model_grads

    def on_step_start(self, loop: Loop) -> None:
        self._begun = time.monotonic()

    def on_batch_loaded(self, loop: Loop) -> None:
        self._loaded = self._ready = time.monotonic()
        if self._gpu:
            self._events[0].record()

    def _mark_ready(self) -> None:
        self._ready = time.monotonic()
        if self._gpu:
            self._events[1].record()

    def on_log(self, loop: Loop, metrics: StepMetrics) -> None:
        if self._steps >= MIN_STEPS:
            means = [total / self._steps for total in self._sums]
            self._sums, self._steps = [], 0
            self._report(loop, metrics.step, means)

    def on_step_end(self, loop: Loop, metrics: StepMetrics) -> None:
        if metrics.rank_seconds:  # a step that was applied
            self._steps += 1
        if self._steps > 0 and metrics.rank_seconds:
            before = self._sums or [0.0] * len(metrics.rank_seconds)
            self._sums = [a + b for a, b in zip(before, metrics.rank_seconds, strict=True)]
        computing = self._ready - self._loaded
        if self._gpu and self._ready > self._loaded:
            # The step has read its results from the device, so both events are over and nothing is waited for.
            computing = self._events[0].elapsed_time(self._events[1]) / 1000
        self.seconds = self._loaded - self._begun + computing

    def _report(self, loop: Loop, step: int, means: list[float]) -> None:
        median = statistics.median(means)
        slow = [rank for rank, seconds in enumerate(means) if seconds > self.ratio * median > 0]
        if not slow:
            return
        worst = sorted(slow, key=lambda rank: -means[rank])[:8]
        named = ", ".join(f"rank {r} on {self._hosts[r]} ({means[r] / median:.2f}x)" for r in worst)
        loop.emit(
            "on_guard",
            {
                "guard": "straggler", "step": step, "problem": f"slower than the median of all ranks: {named}",
                "median_seconds": median, "ranks": worst, "seconds": [means[rank] for rank in worst],
            },
        )  # fmt: skip
