"""Evaluations of the model that is being trained, under its parallel layout: what they are, and what they tell.

Each is the same every time and under every layout, so that runs, and a run and its continuation, can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation has found, as those who log it want it."""

    name: str  # of the evaluation
    record: dict[str, Any]  # plain data: what its line in metrics.jsonl holds beside step and tokens
    figures: dict[str, float]  # "books/loss": points of curves, in TensorBoard and W&B below the evaluation's name
    summary: str  # for people


@dataclass(frozen=True)
class EvaluationInTraining:
    """``name``: of its lines in metrics.jsonl; a run that goes on after a death looks there for what it owes."""

    name: str
    interval: int  # steps; 0: only at the end
    run: Callable[[], EvaluationResult]  # collective
