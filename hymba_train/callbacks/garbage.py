"""Python's garbage collector, on all ranks at the same steps."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from hymba_train.callbacks.base import Callback

if TYPE_CHECKING:
    from hymba_train.train.loop import Loop
    from hymba_train.train.metrics import StepMetrics

INTERVAL_STEPS = 100


class CollectGarbage(Callback):
    """Collects every ``interval`` steps instead of whenever Python likes.

    An autograd graph is many thousand objects a step, so a collection comes up within nearly every step; it takes tens
    of milliseconds in which nothing is launched, and all other ranks wait for the one whose turn it is. What is there
    when training starts lives as long as the run and is not looked at again.
    """

    def __init__(self, interval: int = INTERVAL_STEPS) -> None:
        self.interval = interval

    def on_train_start(self, loop: Loop) -> None:
        gc.collect()
        gc.freeze()
        gc.disable()

    def on_step_end(self, loop: Loop, metrics: StepMetrics) -> None:
        if loop.state.step % self.interval == 0:
            gc.collect()

    def on_rewind(self, loop: Loop) -> None:
        gc.collect()  # of the steps that are forgotten, and of loading

    def close(self) -> None:
        gc.enable()
        gc.unfreeze()
