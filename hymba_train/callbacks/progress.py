"""The line a person watches."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from hymba_train.callbacks.base import Callback

if TYPE_CHECKING:
    from hymba_train.evaluation.in_training import EvaluationResult
    from hymba_train.train.loop import Loop
    from hymba_train.train.metrics import StepMetrics


class Progress(Callback):
    """On a terminal one line that is rewritten, with a bar and the time left; else one plain line a logged step."""

    def __init__(
        self, total_tokens: int, total_steps: int | None, header: list[str], stream: TextIO | None = None
    ) -> None:
        """``header`` lines are printed once at the start. ``total_steps`` None: not known in advance."""
        self.total_tokens, self.total_steps, self.header = total_tokens, total_steps, header
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._on_line = False

    def on_train_start(self, loop: Loop) -> None:
        for line in self.header:
            self.say(line)
        self._start, self._start_tokens = time.monotonic(), loop.state.tokens
        if loop.state.step:
            self.say(f"continuing after step {loop.state.step} ({format_count(loop.state.tokens)} tokens)")

    def on_phase_start(self, loop: Loop, phase: str) -> None:
        self.say(f"phase {phase} from step {loop.state.step + 1}")

    def on_step_end(self, loop: Loop, metrics: StepMetrics) -> None:
        if self._live:
            self._rewrite(self.line(metrics))

    def on_log(self, loop: Loop, metrics: StepMetrics) -> None:
        if not self._live:
            self.say(self.line(metrics))

    def on_guard(self, loop: Loop, event: dict) -> None:
        self.say(describe_event(event))

    def on_rewind(self, loop: Loop) -> None:
        self._start, self._start_tokens = time.monotonic(), loop.state.tokens
        self.say(f"went back to step {loop.state.step}")

    def on_evaluation_end(self, loop: Loop, result: EvaluationResult) -> None:
        self.say(f"step {loop.state.step} {result.summary}")

    def on_checkpoint_saved(self, loop: Loop, path: Path, step: int) -> None:
        self.say(f"saved {path}")

    def on_train_end(self, loop: Loop) -> None:
        self.say(f"done at step {loop.state.step}, {format_count(loop.state.tokens)} tokens: {loop.stop_reason}")

    def on_exception(self, loop: Loop, error: BaseException) -> None:
        self.say(f"stopped at step {loop.state.step} by {type(error).__name__}")

    def line(self, m: StepMetrics) -> str:
        """One step in words; the units are in the names or behind the figures."""
        step = f"{m.step}" if self.total_steps is None else f"{m.step}/{self.total_steps}"
        mfu = "mfu n/a" if m.mfu is None else f"mfu {m.mfu:.1%}"
        mfu += "" if m.mfu_executed is None else f" ({m.mfu_executed:.1%} executed)"
        memory = "" if m.memory_gib is None else f"  mem {m.memory_gib:.1f} GiB"
        objective = "".join(f"  {name} {value:.4g}" for name, value in (m.objective or {}).items())
        return (
            f"step {step}  {m.phase}  loss {m.loss:.4f}{objective}  gnorm {m.grad_norm:.3f}  lr {m.lr:.2e}  "
            f"{format_count(m.tokens)} tok  {format_count(m.tokens_per_second)} tok/s  "
            f"{m.tflops_per_second_per_device:.1f} TFLOP/s  {mfu}{memory}  eta {self.eta(m.tokens)}"
        )

    def eta(self, tokens: int) -> str:
        """Time until ``total_tokens``, at the mean speed of this process since its start (waits included)."""
        done = tokens - self._start_tokens
        if done <= 0:
            return "?"
        return format_seconds((self.total_tokens - tokens) * (time.monotonic() - self._start) / done)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._on_line:
            self._stream.write("\r\x1b[K")
            self._on_line = False
        self._stream.write(text + "\n")
        self._stream.flush()

    def _rewrite(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        self._stream.write("\r\x1b[K" + text[:width])
        self._stream.flush()
        self._on_line = True

    def close(self) -> None:
        if self._on_line:
            self._stream.write("\n")


def describe_event(event: dict) -> str:
    """A guard's event in one line."""
    facts = {k: v for k, v in event.items() if k not in ("guard", "step", "problem", "action")}
    action = f" -> {event['action']}" if "action" in event else ""
    more = "  ".join(f"{name} {_short(value)}" for name, value in facts.items())
    return f"step {event['step']} {event['guard']}: {event.get('problem', '')}{action}  {more}"


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def format_count(value: float) -> str:
    """
    >>> [format_count(x) for x in (12, 1234, 1.5e6, 2e9, 3.25e12)]
    ['12', '1.23k', '1.50M', '2.00B', '3.25T']
    """
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return f"{value:.0f}"


def format_seconds(seconds: float) -> str:
    """
    >>> [format_seconds(x) for x in (5, 65, 3700, 90061)]
    ['5s', '1m05s', '1h01m', '1d01h']
    """
    s = max(int(seconds), 0)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"
