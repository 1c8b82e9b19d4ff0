"""A loop that only has what callbacks look at."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hymba_train.train.metrics import StepMetrics
from hymba_train.train.state import TrainState


class FakeLoop(SimpleNamespace):
    """``step(n)`` moves it to step n and calls the real loop's hooks; ``emitted`` keeps what was called."""

    def __init__(self, *callbacks):
        super().__init__(
            state=TrainState(), callbacks=list(callbacks), emitted=[], trained=False,
            stop_reason="", finished=False, failed=False, suspect=False, answers=(0, 0),
        )  # fmt: skip

    def emit(self, event, *args):
        self.emitted.append((event, *args))
        for callback in self.callbacks:
            getattr(callback, event)(self, *args)

    def start(self):
        self.emit("on_train_start")
        self.emit("on_phase_start", "short")

    def step(self, number: int, **values):
        self.emit("on_step_start")
        self.state.step, self.state.tokens, self.trained = number, number * 100, True
        metrics = metrics_of(number, **values)
        self.emit("on_log", metrics)
        self.emit("on_step_end", metrics)

    def end(self, finished=True):
        self.finished, self.stop_reason = finished, "all phases trained" if finished else "a signal"
        self.emit("on_train_end")
        for callback in self.callbacks:
            callback.close()


def metrics_of(step: int, **values) -> StepMetrics:
    fields = dict(
        step=step, phase="short", loss=3.0 - 0.1 * step, grad_norm=0.1, lr=1e-3, tokens=step * 100, labelled_tokens=96,
        batch_size=4, seq_length=25, step_seconds=0.5, tokens_per_second=200.0, tflops_per_second_per_device=0.25,
        mfu=None, memory_gib=None,
    )  # fmt: skip
    return StepMetrics(**{**fields, **values})


@pytest.fixture
def loop_of():
    return FakeLoop
