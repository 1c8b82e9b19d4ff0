"""The callbacks of a run, in the order in which they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hymba_train.callbacks.base import Callback
from hymba_train.callbacks.checkpointing import Checkpointing, Writer
from hymba_train.callbacks.curve import LossCurve
from hymba_train.callbacks.evaluation import Evaluation
from hymba_train.callbacks.export import Export
from hymba_train.callbacks.garbage import CollectGarbage
from hymba_train.callbacks.jsonl import METRICS, JsonLines, read_events
from hymba_train.callbacks.never_fatal import NeverFatal
from hymba_train.callbacks.profile import Profile
from hymba_train.callbacks.progress import Progress
from hymba_train.callbacks.stop import StopOnRequest
from hymba_train.callbacks.tensorboard import TensorBoard
from hymba_train.callbacks.wandb import WandB
from hymba_train.config.schema import Config
from hymba_train.guards.starts import Starts
from hymba_train.parallel.ranks import on_rank_0
from hymba_train.parallel.runtime import Runtime
from hymba_train.plan.steps import StepPlan

if TYPE_CHECKING:
    from hymba_train.evaluation.in_training import EvaluationInTraining
    from hymba_train.train.metrics import Peak

EXPORTS = "hf"


def build_callbacks(
    config: Config, directory: Path, runtime: Runtime, steps: StepPlan, peak: Peak, writer: Writer,
    evaluations: Iterable[EvaluationInTraining],
    touch: Callable[[], None] = lambda: None,
) -> list[Callback]:  # fmt: skip
    """Checkpoints and evaluations on every rank, first, and exports on the first; then, on the logging rank, everything
    that only looks on.

    Args:
        peak: the meter's.
        touch: tells the watchdog that a long wait is none for others.
    """
    c = config.checkpoint
    callbacks: list[Callback] = []
    if c.enabled:  # before the evaluation, which takes long and may be cut off
        callbacks.append(Checkpointing(writer, c.save_interval))
    for evaluation in evaluations:
        callbacks.append(Evaluation(evaluation, _missing(directory / METRICS, evaluation.name)))
    if c.enabled and c.export_interval is not None and runtime.rank == 0:
        exports = Export(directory / EXPORTS, c.export_interval, c.export_dtype, checkpoints=writer.root, touch=touch)
        callbacks.append(NeverFatal(exports))
    callbacks.append(CollectGarbage())
    callbacks.append(StopOnRequest(directory, runtime.rank == 0))
    if runtime.rank == 0:
        callbacks.append(Starts(directory))
    if runtime.is_logging_rank:
        callbacks += [NeverFatal(callback) for callback in _loggers(config, directory, runtime, steps, peak)]
    return callbacks


def _missing(metrics: Path, event: str) -> Callable[[int], bool]:
    """Whether metrics.jsonl lacks an event at a step of a run that has trained; the same answer on all ranks."""

    def missing(step: int) -> bool:
        return step > 0 and on_rank_0(lambda: all(line["step"] != step for line in read_events(metrics, event)))

    return missing


def _loggers(config: Config, directory: Path, runtime: Runtime, steps: StepPlan, peak: Peak) -> list[Callback]:
    log, metrics = config.logging, directory / METRICS
    mfu = peak.name if peak.flops is None else f"{peak.name} x {runtime.world_size}"
    facts = {
        "run": config.run.name,
        "seed": config.run.seed,
        "world_size": runtime.world_size,
        "data_parallel": runtime.data_parallel_size,
        "device": str(runtime.device.type),
        "mfu_denominator": mfu,
    }
    last = steps.num_steps if config.run.train_steps is None else min(config.run.train_steps, steps.num_steps)
    loggers: list[Callback] = [
        Progress(steps.tokens_before(last), last, [f"run {directory}  MFU denominator: {mfu}"]),
        JsonLines(metrics, facts),
    ]
    if log.profile:
        loggers.append(Profile(log.profile, directory / "profile"))
    if log.tensorboard:
        loggers.append(TensorBoard(directory / "tensorboard"))
    if log.wandb:
        loggers.append(WandB(directory, log.wandb_project, log.wandb_entity, config.run.name, asdict(config)))
    loggers.append(LossCurve(metrics, directory / "loss_curves.png", config.run.name))
    return loggers
