"""``hymba train``: from a checked configuration to a trained model."""

from __future__ import annotations

import logging
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hymba_train.callbacks.build import build_callbacks
from hymba_train.checkpoint.children import stop_when_parent_dies
from hymba_train.checkpoint.directory import CHECKPOINTS, has_any, prune, step_of
from hymba_train.checkpoint.load import Source, find_source, load_checkpoint
from hymba_train.checkpoint.metadata import Layout, metadata_of, origin_of, read_metadata
from hymba_train.checkpoint.save import CheckpointWriter
from hymba_train.checkpoint.together import locked
from hymba_train.config import run_directory
from hymba_train.config.schema import Config
from hymba_train.data.build import build_training_data
from hymba_train.data.identity import DataRecord
from hymba_train.describe.dims import effective_rotary_base
from hymba_train.evaluation.build import evaluations_in_training
from hymba_train.exit_codes import GUARD_STOP, STOPPED_EARLY
from hymba_train.guards.build import Guards, refusal_at_start, refusal_from, watched
from hymba_train.guards.starts import forget_earlier_outcome
from hymba_train.guards.watchdog import Watchdog
from hymba_train.model import build_model_chunks
from hymba_train.parallel import fp8_state, initialize, shutdown
from hymba_train.parallel.gathered import gathered_parameters
from hymba_train.parallel.ranks import alike, failing_at_once, on_rank_0
from hymba_train.parallel.runtime import Runtime
from hymba_train.train.dpo import objective_of
from hymba_train.train.feed import Feed
from hymba_train.train.graph import GraphedPasses, work_on_own_stream
from hymba_train.train.loop import Loop, PlannedStep
from hymba_train.train.metrics import ThroughputMeter, peak_of
from hymba_train.train.optimizer import build_optimizer, wrap_model
from hymba_train.train.order import Order
from hymba_train.train.schedules import set_hyperparameters
from hymba_train.train.state import TrainState
from hymba_train.train.step import Stepper, StepResult

if TYPE_CHECKING:
    from hymba_train.plan import Plan

logger = logging.getLogger(__name__)


def train(config: Config, plan: Plan) -> int:
    """Train a run to its end, from its newest checkpoint if it has one. Returns the exit code: 0, or one of
    hymba_train.exit_codes.

    Called by every rank, with a configuration that ``plan`` has checked. Raises UserError for what only shows here:
    missing data, a checkpoint that cannot be read, a backend this machine does not have, a run directory in use.
    """
    directory = run_directory(config)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        stop_when_parent_dies()
    runtime = initialize(config)
    reason = refusal_at_start(directory)
    if reason is not None:
        return give_up(runtime, reason)
    with failing_at_once(), locked(directory), watched(config, directory, runtime) as watchdog:
        on_rank_0(lambda: forget_earlier_outcome(directory))
        return _train(config, plan, directory, runtime, watchdog)


def _train(config: Config, plan: Plan, directory: Path, runtime: Runtime, watchdog: Watchdog | None) -> int:
    if config.run.cuda_graph:
        work_on_own_stream(runtime.device)
    seed_everything(config.run.seed, config.run.deterministic)
    assert plan.steps is not None, "the plan is complete"
    order = Order(config, plan.steps)
    data = alike(lambda: build_training_data(config.data, seed=config.run.seed, vocab_size=config.model.vocab_size))
    models = alike(lambda: build_model_chunks(config, runtime, [chunk.layers for chunk in plan.chunks]))
    logger.info("backends: %s", models[0].ops.description)
    fp8_state.prepare(models)
    chunks = wrap_model(config, runtime, models)
    optimizer = build_optimizer(config, runtime, chunks)
    record = DataRecord(alike(data.identity))
    start = Start(config, directory, runtime, chunks, optimizer, order, record)
    source = find_source(config, directory)
    objective = objective_of(config, data, source, directory)
    state, remembered = start.load(source)
    reason = refusal_from(config, directory, state.step)
    if reason is not None:
        return give_up(runtime, reason)

    graphed = None
    if config.run.cuda_graph:
        graphed = GraphedPasses(runtime.device, keep=lambda: fp8_state.cast_weights(models))
    stepper = Stepper(runtime, chunks, optimizer, objective, graphed)
    guards = Guards(config, directory, runtime, models, chunks, optimizer, stepper, data, state, watchdog)
    guards.load(remembered)
    phases = list(config.data.phases.values())
    feed = Feed(data, order, state, runtime)
    meter = ThroughputMeter(
        runtime.device, runtime.world_size, peak_of(runtime.device, config.precision.params, config.precision.fp8),
        hidden_bytes=lambda: graphed.num_bytes if graphed else 0,
    )  # fmt: skip
    layout, origin = Layout.of(config, runtime), None if source is None else origin_of(read_metadata(source.path))
    kept, root = config.checkpoint, directory / CHECKPOINTS
    writer = CheckpointWriter(
        root, runtime, chunks, optimizer,
        lambda saved: metadata_of(config, layout, saved, record.to_dict(), guards.to_dict(), origin),
        kept.async_save, lambda: prune(root, kept.keep_last, kept.keep_every),
    )  # fmt: skip

    callbacks = guards.callbacks + alike(
        lambda: build_callbacks(
            config, directory, runtime, order.plan, meter.peak, writer,
            evaluations_in_training(config, data, stepper, lambda: phases[state.phase]),
            watchdog.touch if watchdog else lambda: None,
        )
    )  # fmt: skip

    def start_phase(step: PlannedStep) -> None:
        for model in models:
            model.rotary_base = effective_rotary_base(config.model, phases[step.phase].rope_type)

    def one_step(step: PlannedStep, batches: list, requests: tuple[int, ...]) -> StepResult:
        set_hyperparameters(optimizer.param_groups, step.lr, config.optim.weight_decay)
        return guards.step(step, batches, requests)

    def go_back() -> bool:
        for path in writer.poll(wait=True):
            loop.emit("on_checkpoint_saved", path, step_of(path))
        if not on_rank_0(lambda: has_any(writer.root)):
            return False
        with gathered_parameters(chunks):
            loaded, remembered = start.load(find_source(config, directory))
        for name, value in loaded.to_dict().items():
            setattr(state, name, value)
        guards.load(remembered)
        feed.restart(state)
        return True

    loop = Loop(
        state, order, callbacks, meter, load=feed.load, train=one_step, start_phase=start_phase,
        batch_hash=feed.hash if config.logging.batch_hash and runtime.is_logging_rank else None,
        log_interval=config.logging.log_interval, train_steps=config.run.train_steps, go_back=go_back,
        ask=writer.status, max_lost=config.guards.max_skips,
    )  # fmt: skip
    try:
        loop.run()
    finally:
        feed.close()
    if graphed:
        graphed.drop()
    shutdown()  # not after an exception: other ranks may be waiting for this one, and torchrun ends them all
    if loop.failed:
        return GUARD_STOP
    return 0 if loop.finished else STOPPED_EARLY


def give_up(runtime: Runtime, reason: str) -> int:
    """End in good order, on every rank, a process that will not train. Returns its exit code."""
    if runtime.is_logging_rank:
        logger.error("giving up: %s", reason)
    shutdown()
    return GUARD_STOP


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python, torch and Megatron-Core's generators. Initial values and data order have seeds of their own."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


@dataclass(frozen=True)
class Start:
    """Loads what a run starts from, or goes back to, into model and optimizer."""

    config: Config
    directory: Path
    runtime: Runtime
    chunks: list
    optimizer: Any
    order: Order
    record: DataRecord

    def load(self, source: Source | None) -> tuple[TrainState, dict[str, Any] | None]:
        """(where the run stands, what its guards remember). None as ``source``: at the beginning.

        Raises UserError when the run would go on with other data than the checkpoint's, unless accepted.
        """
        if source is None:
            return TrainState(), None
        config, runtime, remembered = self.config, self.runtime, None
        if not source.weights_only:
            saved, name = read_metadata(source.path), source.path.name
            remembered = saved.get("guards")
            accept = config.checkpoint.accept_changed_data
            for line in self.record.resume(saved.get("data"), saved["train_state"], accept, name):
                if runtime.is_logging_rank:
                    logger.warning("%s: accepted other data: %s", name, line)
        loaded = load_checkpoint(source, config, runtime, self.chunks, self.optimizer)
        if runtime.is_logging_rank:
            logger.info("loaded %s%s", source.path, " (weights only)" if source.weights_only else "")
        if loaded.state is None:
            return TrainState(), None
        state = TrainState.from_dict(loaded.state)
        self.order.check(state)
        if not loaded.rng_restored:
            seed_everything(config.run.seed + state.step, config.run.deterministic)
        return state, remembered
