"""PyTorch's profiler over a few steps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hymba_train.callbacks.base import Callback
from hymba_train.errors import UserError

if TYPE_CHECKING:
    from hymba_train.train.loop import Loop
    from hymba_train.train.metrics import StepMetrics

# Part of a training step -> names of its GPU kernels; the first match counts. What none matches is "elementwise".
PARTS: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl"),
    ("scan", r"scan_|selective_scan"),
    ("attention", r"flex_attention|fmha|flash|cudnn|merge_meta|meta_backward"),
    ("conv", r"conv_"),
    ("matrix products", r"nvjet|gemm|cutlass|xmma|splitK|s16816"),
    ("FP8 casts", r"cast_|transpose_|quantize|amax"),
    ("optimizer", r"adam|multi_tensor|l2norm"),
    ("norms", r"norm_|group_|average_|rms_?norm"),
    ("swiglu", r"swiglu"),
    ("rope", r"rope|rotary|^rotate"),
    ("cross entropy", r"cross_entropy|softmax|^loss_"),
    ("copies", r"^Memcpy|^Memset|copy|CatArray|FillFunctor"),
)


def part_of(kernel: str) -> str:
    """
    >>> part_of("nvjet_sm90_tst_192x192_64x3"), part_of("scan_backward"), part_of("vectorized_elementwise_kernel")
    ('matrix products', 'scan', 'elementwise')
    """
    return next((part for part, names in PARTS if re.search(names, kernel, re.IGNORECASE)), "elementwise")


class Profile(Callback):
    """Profiles steps first..last (1-based, both included) of this process: a Chrome trace, a table of operations and,
    on a GPU, the milliseconds of a step by part.

    Runs on the rank it is given to. Steps that are not reached give a profile of those that were.
    """

    def __init__(self, steps: str, directory: Path) -> None:
        self.first, self.last = parse_range(steps)
        self.directory = directory
        self._profiler: torch.profiler.profile | None = None

    def on_step_start(self, loop: Loop) -> None:
        if self._profiler is None and loop.state.step + 1 == self.first:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
            self._profiler.start()

    def on_step_end(self, loop: Loop, metrics: StepMetrics) -> None:
        if self._profiler is not None and loop.state.step >= self.last:
            self._write(self._profiler, loop.state.step)

    def on_train_end(self, loop: Loop) -> None:
        if self._profiler is not None:
            self._write(self._profiler, loop.state.step)

    def _write(self, profiler: torch.profiler.profile, step: int) -> None:
        self._profiler = None
        profiler.stop()
        self.directory.mkdir(parents=True, exist_ok=True)
        name = f"steps_{self.first}_{step}"
        profiler.export_chrome_trace(str(self.directory / f"{name}.trace.json"))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=60)
        (self.directory / f"{name}.txt").write_text(table, encoding="utf-8")
        shapes = profiler.key_averages(group_by_input_shape=True).table(sort_by=by, row_limit=100)
        (self.directory / f"{name}.shapes.txt").write_text(shapes, encoding="utf-8")
        parts = device_milliseconds(profiler, step - self.first + 1)
        if parts:
            (self.directory / f"{name}.parts.json").write_text(json.dumps(parts, indent=1), encoding="utf-8")


def device_milliseconds(profiler: torch.profiler.profile, num_steps: int) -> dict[str, float]:
    """GPU time of a step by part (:data:`PARTS`), the largest first; empty where no kernel ran on a GPU."""
    parts: dict[str, float] = {}
    for event in profiler.events():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu and not event.is_user_annotation:
            part = part_of(event.name)
            parts[part] = parts.get(part, 0.0) + event.time_range.elapsed_us() / 1000 / num_steps
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def parse_range(text: str) -> tuple[int, int]:
    """'10:12' -> (10, 12). Raises UserError for anything else than two steps, 1 or more, in order."""
    first, _, last = text.partition(":")
    if first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last):
        return int(first), int(last)
    raise UserError(f"logging.profile={text!r}: give the first and the last step to profile, e.g. '10:12'")
