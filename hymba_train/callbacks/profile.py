"""PyTorch's profiler over a few steps."""

from __future__ import annotations

from pathlib import Path

import torch

from hymba_train.callbacks.base import Callback
from hymba_train.errors import UserError


class Profile(Callback):
    """Profiles steps first..last (1-based, both included) of this process: a Chrome trace and a table of parts.

    Runs on the rank it is given to. Steps that are not reached give a profile of those that were.
    """

    def __init__(self, steps: str, directory: Path) -> None:
        self.first, self.last = parse_range(steps)
        self.directory = directory
        self._profiler: torch.profiler.profile | None = None

    def on_step_start(self, loop) -> None:
        if self._profiler is None and loop.state.step + 1 == self.first:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()

    def on_step_end(self, loop, metrics) -> None:
        if self._profiler is not None and loop.state.step >= self.last:
            self._write(loop.state.step)

    def on_train_end(self, loop) -> None:
        if self._profiler is not None:
            self._write(loop.state.step)

    def _write(self, step: int) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self.directory.mkdir(parents=True, exist_ok=True)
        name = f"steps_{self.first}_{step}"
        profiler.export_chrome_trace(str(self.directory / f"{name}.trace.json"))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=60)
        (self.directory / f"{name}.txt").write_text(table, encoding="utf-8")


def parse_range(text: str) -> tuple[int, int]:
    """'10:12' -> (10, 12). Raises UserError for anything else than two steps, 1 or more, in order."""
    first, _, last = text.partition(":")
    if first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last):
        return int(first), int(last)
    raise UserError(f"logging.profile={text!r}: give the first and the last step to profile, e.g. '10:12'")
