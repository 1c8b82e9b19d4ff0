"""Weights & Biases: one run there for one run here, however often it is restarted."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_train.callbacks.base import Callback
from hymba_train.callbacks.scalars import evaluation_scalars, train_scalars
from hymba_train.errors import UserError
from hymba_train.files import write_atomically

if TYPE_CHECKING:
    from hymba_train.evaluation.in_training import EvaluationResult
    from hymba_train.train.loop import Loop
    from hymba_train.train.metrics import StepMetrics

ID_FILE = "wandb_run_id"


class WandB(Callback):
    """Logs to W&B, offline unless WANDB_API_KEY is set (WANDB_MODE overrules; `wandb sync` uploads later).

    The run id is kept in the run directory and resumed. Step and tokens are axes of their own: after a restart from an
    older checkpoint the step goes back, which W&B's built-in step cannot. The key comes from the environment alone.

    Raises UserError if the package is not installed.
    """

    def __init__(
        self, run_directory: Path, project: str, entity: str | None, name: str, config: dict[str, Any]
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "logging.wandb=true, but the package is not installed: pip install wandb, or logging.wandb=false"
            ) from error
        self._wandb: Any = wandb
        self._run: Any = None
        self.run_directory = run_directory
        self.settings = {"project": project, "entity": entity, "name": name, "config": config}

    def on_train_start(self, loop: Loop) -> None:
        key = os.environ.get("WANDB_API_KEY")
        self._run = self._wandb.init(
            **self.settings, id=run_id(self.run_directory), resume="allow", dir=str(self.run_directory),
            mode=os.environ.get("WANDB_MODE") or ("online" if key else "offline"),
        )  # fmt: skip
        for axis in ("step", "tokens"):
            self._run.define_metric(axis, hidden=True)
        self._run.define_metric("*", step_metric="tokens")

    def on_log(self, loop: Loop, metrics: StepMetrics) -> None:
        self._run.log({**train_scalars(metrics), "step": metrics.step, "tokens": metrics.tokens})

    def on_evaluation_end(self, loop: Loop, result: EvaluationResult) -> None:
        self._run.log({**evaluation_scalars(result), "step": loop.state.step, "tokens": loop.state.tokens})

    def on_exception(self, loop: Loop, error: BaseException) -> None:
        if self._run is not None:
            self._run.finish(exit_code=1)
            self._run = None

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def run_id(run_directory: Path) -> str:
    """The id in ``wandb_run_id`` of the run directory, made there the first time."""
    path = run_directory / ID_FILE
    if path.exists() and (kept := path.read_text(encoding="utf-8").strip()):
        return kept
    made = secrets.token_hex(4)
    write_atomically(path, made + "\n")
    return made
