"""How much of a run's time was useful, over all restarts, from the lines of its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterable

from hymba_train.callbacks.jsonl import Line


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
