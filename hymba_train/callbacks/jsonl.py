"""metrics.jsonl in the run directory: one JSON object a line, appended over all restarts."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hymba_train.callbacks.base import Callback


class JsonLines(Callback):
    """Writes ``{"event": "train", "step": ...}`` lines; other events are validation, recall, start, phase, checkpoint,
    guard, rewind and end.

    Loss and gradient norm are written a second time as hexadecimal floats (``loss_hex``), which is what two runs are
    compared by bit for bit. After a restart, steps behind the loaded checkpoint come again: the last line of a step
    counts.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        """``facts`` (device, layout, MFU denominator ...) go into the start line of every process."""
        self.path, self.facts = path, facts
        path.parent.mkdir(parents=True, exist_ok=True)
        self._end_torn_line()
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (held open for the run)

    def _end_torn_line(self) -> None:
        """A process that was killed while writing leaves half a line: keep the next one apart from it."""
        if self.path.exists() and self.path.stat().st_size:
            with open(self.path, "rb+") as file:
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")

    def write(self, event: str, step: int, **values: Any) -> None:
        record = {"event": event, "step": step, **{k: _plain(v) for k, v in values.items()}}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def on_train_start(self, loop) -> None:
        self.write("start", loop.state.step, tokens=loop.state.tokens, time=time.time(), **self.facts)

    def on_phase_start(self, loop, phase: str) -> None:
        self.write("phase", loop.state.step, phase=phase, samples_in_phase=loop.state.samples_in_phase)

    def on_log(self, loop, metrics) -> None:
        values = asdict(metrics)
        step = values.pop("step")
        del values["rank_seconds"]  # as many as ranks: a straggler is named in an event of its own
        values |= values.pop("objective") or {}
        if values["batch_hash"] is None:
            del values["batch_hash"]
        self.write(
            "train", step, **values, loss_hex=float(metrics.loss).hex(), grad_norm_hex=float(metrics.grad_norm).hex()
        )

    def on_guard(self, loop, event: dict) -> None:
        self.write("guard", **{"step": loop.state.step, "time": time.time(), **event})

    def on_rewind(self, loop) -> None:
        self.write("rewind", loop.state.step, tokens=loop.state.tokens)

    def on_evaluate_end(self, loop, losses: dict[str, float]) -> None:
        hexes = {name: float(loss).hex() for name, loss in losses.items()}
        self.write("validation", loop.state.step, tokens=loop.state.tokens, loss=losses, loss_hex=hexes)

    def on_recall_end(self, loop, scores: dict[str, dict[str, Any]]) -> None:
        self.write("recall", loop.state.step, tokens=loop.state.tokens, tasks=scores)

    def on_checkpoint_saved(self, loop, path: Path, step: int) -> None:
        self.write("checkpoint", step, path=path.name, time=time.time())

    def on_train_end(self, loop) -> None:
        self.write("end", loop.state.step, tokens=loop.state.tokens, reason=loop.stop_reason, time=time.time())

    def on_exception(self, loop, error: BaseException) -> None:
        reason = f"{type(error).__name__}: {error}"
        self.write("end", loop.state.step, tokens=loop.state.tokens, reason=reason, time=time.time())

    def close(self) -> None:
        self._file.close()


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them (the hexadecimal twin says which)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value


def read_events(path: Path, event: str) -> list[dict[str, Any]]:
    """Records of one kind, in the order of their steps, the last line of a step counting; a torn line is left out."""
    records: dict[int, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and record.get("event") == event:
                records[record["step"]] = record
    return [records[step] for step in sorted(records)]
