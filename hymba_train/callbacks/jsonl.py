"""metrics.jsonl in the run directory: one JSON object a line, appended over all restarts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_train.callbacks.base import Callback
from hymba_train.json_lines import finite, open_to_append, read_json_lines

if TYPE_CHECKING:
    from hymba_train.evaluation.in_training import EvaluationResult
    from hymba_train.train.loop import Loop
    from hymba_train.train.metrics import StepMetrics

METRICS = "metrics.jsonl"
Line = dict[str, Any]


class JsonLines(Callback):
    """Writes ``{"event": "train", "step": ...}`` lines; other events are start, phase, checkpoint, guard, rewind, end,
    and evaluations by their names (validation, recall).

    Loss and gradient norm are written a second time as hexadecimal floats (``loss_hex``), which is what two runs are
    compared by bit for bit. After a restart, steps behind the loaded checkpoint come again: the last line of a step
    counts.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        """``facts`` (device, layout, MFU denominator ...) go into the start line of every process."""
        self.path, self.facts = path, facts
        self._file = open_to_append(path)

    def write(self, event: str, step: int, **values: Any) -> None:
        record = {"event": event, "step": step, **finite(values)}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def on_train_start(self, loop: Loop) -> None:
        self.write("start", loop.state.step, tokens=loop.state.tokens, time=time.time(), **self.facts)

    def on_phase_start(self, loop: Loop, phase: str) -> None:
        self.write("phase", loop.state.step, phase=phase, samples_in_phase=loop.state.samples_in_phase)

    def on_log(self, loop: Loop, metrics: StepMetrics) -> None:
        values = asdict(metrics)
        step = values.pop("step")
        del values["rank_seconds"]  # as many as ranks: a straggler is named in an event of its own
        values |= values.pop("objective") or {}
        if values["batch_hash"] is None:
            del values["batch_hash"]
        self.write(
            "train", step, **values, loss_hex=float(metrics.loss).hex(), grad_norm_hex=float(metrics.grad_norm).hex()
        )

    def on_guard(self, loop: Loop, event: dict) -> None:
        self.write("guard", **{"step": loop.state.step, "time": time.time(), **event})

    def on_rewind(self, loop: Loop) -> None:
        self.write("rewind", loop.state.step, tokens=loop.state.tokens)

    def on_evaluation_end(self, loop: Loop, result: EvaluationResult) -> None:
        self.write(result.name, loop.state.step, tokens=loop.state.tokens, **result.record)

    def on_checkpoint_saved(self, loop: Loop, path: Path, step: int) -> None:
        self.write("checkpoint", step, path=path.name, time=time.time())

    def on_train_end(self, loop: Loop) -> None:
        self.write("end", loop.state.step, tokens=loop.state.tokens, reason=loop.stop_reason, time=time.time())

    def on_exception(self, loop: Loop, error: BaseException) -> None:
        reason = f"{type(error).__name__}: {error}"
        self.write("end", loop.state.step, tokens=loop.state.tokens, reason=reason, time=time.time())

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[Line]:
    """All records in the order in which they were written; torn lines are left out."""
    return [r for r in read_json_lines(path) if isinstance(r.get("step"), int) and "event" in r]


def counting(lines: Iterable[Line], event: str) -> list[Line]:
    """Records of one kind that are part of the run's history, by step. A process that starts from step s replaces
    everything that was logged after s before it."""
    kept: list[Line] = []  # in order of steps: what is replaced is always at the end
    for line in lines:
        if line["event"] == "start":
            while kept and kept[-1]["step"] > line["step"]:
                kept.pop()
        if line["event"] == event:
            while kept and kept[-1]["step"] >= line["step"]:
                kept.pop()
            kept.append(line)
    return kept


def read_events(path: Path, event: str) -> list[Line]:
    """:func:`counting` of a file; nothing if it is not there."""
    return counting(read_lines(path), event)
