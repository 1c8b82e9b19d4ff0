"""TensorBoard events in the run directory; the x-axis is the step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_train.callbacks.base import Callback
from hymba_train.callbacks.scalars import evaluation_scalars, train_scalars
from hymba_train.errors import UserError

if TYPE_CHECKING:
    from hymba_train.evaluation.in_training import EvaluationResult
    from hymba_train.train.loop import Loop
    from hymba_train.train.metrics import StepMetrics


class TensorBoard(Callback):
    """Writes ``<directory>/events.out.*``. Raises UserError if the package is not installed."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "logging.tensorboard=true, but the package is not installed: pip install tensorboard, or "
                "logging.tensorboard=false"
            ) from error
        self._make = SummaryWriter
        self.directory = directory
        self._writer: Any = None

    def on_train_start(self, loop: Loop) -> None:
        # Steps behind the loaded checkpoint are trained again: TensorBoard drops their old points.
        self._writer = self._make(log_dir=str(self.directory), purge_step=loop.state.step + 1)

    def on_log(self, loop: Loop, metrics: StepMetrics) -> None:
        for name, value in {**train_scalars(metrics), "train/tokens": metrics.tokens}.items():
            self._writer.add_scalar(name, value, metrics.step)

    def on_evaluation_end(self, loop: Loop, result: EvaluationResult) -> None:
        for name, value in evaluation_scalars(result).items():
            self._writer.add_scalar(name, value, loop.state.step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
