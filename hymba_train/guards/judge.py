"""Whether a step's loss and gradient norm are usual, and how many that were not the run may still skip.

Free of torch. Every rank judges the same two numbers by the same history, so all come to the same verdict.
"""

from __future__ import annotations

import math
from typing import Any

from hymba_train.config.schema import GuardsConfig
from hymba_train.guards.window import Window


class Judge:
    """Memory of a run's accepted steps and of its skips. Part of every checkpoint (:meth:`to_dict`)."""

    def __init__(self, config: GuardsConfig) -> None:
        self.config = config
        self._loss, self._log_norm = Window(config.window_steps), Window(config.window_steps)
        self._phase = -1
        self._skipped_steps: list[int] = []

    def start_phase(self, phase: int) -> None:
        """Other data or lengths have another usual loss: a new phase begins with an empty history."""
        if phase != self._phase:
            self._phase = phase
            self._loss.clear()
            self._log_norm.clear()

    def problem(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step, in words; None if it may be applied."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm} (loss {loss:.4g})"
        most_loss, most_norm = self.limits()
        if loss > most_loss:
            return f"the loss is {loss:.4g}, above {most_loss:.4g}"
        if grad_norm > most_norm:
            return f"the gradient norm is {grad_norm:.4g}, above {most_norm:.4g}"
        return None

    def limits(self) -> tuple[float, float]:
        """(largest usual loss, largest usual gradient norm); infinite while the history is short."""
        c = self.config
        if len(self._loss) < c.min_window_steps:
            return math.inf, math.inf
        most_norm = math.exp(self._log_norm.limit(c.spike_sigmas, math.log(c.grad_spike_ratio)))
        return self._loss.limit(c.spike_sigmas, c.loss_spike_nats), most_norm

    def accept(self, loss: float, grad_norm: float) -> None:
        """Remember a step that is applied. Never called with values that :meth:`problem` has refused."""
        self._loss.add(loss)
        self._log_norm.add(math.log(max(grad_norm, 1e-30)))

    def count_skip(self, step: int) -> str | None:
        """Remember that ``step`` was skipped. Returns why the run must end, if there were too many."""
        c = self.config
        self._skipped_steps = [s for s in self._skipped_steps if step - c.skip_window_steps < s < step] + [step]
        if len(self._skipped_steps) > c.max_skips:
            return (
                f"{len(self._skipped_steps)} steps skipped within {c.skip_window_steps} (guards.max_skips="
                f"{c.max_skips}): {', '.join(map(str, self._skipped_steps[-20:]))}"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """What it has seen, as plain data."""
        return {
            "phase": self._phase,
            "loss": self._loss.to_list(),
            "log_grad_norm": self._log_norm.to_list(),
            "skipped_steps": list(self._skipped_steps),
        }

    def load(self, saved: dict[str, Any] | None) -> None:
        """Take over what :meth:`to_dict` gave; None (a checkpoint of a run without guards) begins anew."""
        saved = saved or {"phase": -1, "loss": [], "log_grad_norm": [], "skipped_steps": []}
        self._phase = int(saved["phase"])
        self._loss.load(saved["loss"])
        self._log_norm.load(saved["log_grad_norm"])
        self._skipped_steps = [int(step) for step in saved["skipped_steps"]]
