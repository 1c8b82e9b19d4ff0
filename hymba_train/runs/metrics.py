"""Reading metrics.jsonl over all restarts: what counts, what was trained twice, how much of the time was useful."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """All records in the order in which they were written; torn lines are left out."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(text)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int) and "event" in record:
                lines.append(record)
    return lines


def counting(lines: Iterable[Line], event: str) -> list[Line]:
    """Records of one kind that are part of the run's history, by step. A process that starts from step s replaces
    everything that was logged after s before it."""
    kept: list[Line] = []
    for line in lines:
        if line["event"] == "start":
            kept = [k for k in kept if k["step"] <= line["step"]]
        elif line["event"] == event:
            kept = [k for k in kept if k["step"] < line["step"]]
            kept.append(line)
    return kept


def useful_seconds(lines: Iterable[Line]) -> float:
    """Time spent in optimizer steps that count; each record holds the mean step time since the one before."""
    spans: list[tuple[int, float]] = []  # (last step, seconds) of each logged interval
    before = 0
    for line in lines:
        if line["event"] == "start":
            before = line["step"]
            spans = [span for span in spans if span[0] <= before]
        elif line["event"] == "train" and line["step"] > before:
            spans.append((line["step"], (line["step"] - before) * line["step_seconds"]))
            before = line["step"]
    return sum(seconds for _, seconds in spans)


def goodput(lines: list[Line], last_sign: float) -> float | None:
    """Share (0..1) of the time from the first start to ``last_sign`` (seconds since 1970) that went into steps that
    count. What is lost: starting up, waiting in a queue between restarts, evaluations, saves, steps trained twice.
    None before there is anything to say."""
    starts = [line["time"] for line in lines if line["event"] == "start" and "time" in line]
    if not starts or last_sign <= starts[0]:
        return None
    return min(useful_seconds(lines) / (last_sign - starts[0]), 1.0)
