"""What the guards cost a step: the same model, optimizer and batches, with and without them by turns, in one process.

    python -m benchmarks.guard_overhead                                            # hymba_tiny on a CPU
    python -m benchmarks.guard_overhead experiment=bench_1p5b --steps 10           # Hymba-1.5B on one GPU
    torchrun --nproc-per-node=2 -m benchmarks.guard_overhead parallel=dp ...       # with what several ranks compare

A block of steps with guards (numerical guard, watchdog and its monitor, stragglers) and one without make a pair; which
comes first alternates. Printed are the median over the pairs of (with - without) / without, and its quartiles; the CPU
time of the guards' own code a step, which a busy machine does not blur; and the time of one comparison of replicas,
which comes once in guards.drift_interval steps. Batches are random tokens: no data is needed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from hymba_train.config import compose
from hymba_train.guards.build import Guards
from hymba_train.guards.drift import checksum, replicas_of
from hymba_train.guards.watchdog import Watchdog
from hymba_train.model import build_model_chunks
from hymba_train.parallel import initialize, shutdown
from hymba_train.plan import make_plan
from hymba_train.train.loop import PlannedStep
from hymba_train.train.main import seed_everything
from hymba_train.train.optimizer import build_optimizer, wrap_model
from hymba_train.train.schedules import set_hyperparameters
from hymba_train.train.state import TrainState
from hymba_train.train.step import Stepper

DEFAULT = ["experiment=demo", "parallel=dp", "run.device=auto"]


class Bench:
    """A model that trains on the first phase's batch shape, guarded or not."""

    def __init__(self, overrides: list[str], directory: Path) -> None:
        self.config = config = compose([*overrides, f"run.directory={directory}"])
        self.runtime = runtime = initialize(config)
        plan = make_plan(config, runtime.world_size, check_paths=False)
        seed_everything(config.run.seed, deterministic=False)
        self.models = build_model_chunks(config, runtime, [chunk.layers for chunk in plan.chunks])
        self.chunks = wrap_model(config, runtime, self.models)
        self.optimizer = build_optimizer(config, runtime, self.chunks)
        set_hyperparameters(self.optimizer.param_groups, 1e-4, 0.0)
        self.stepper = Stepper(runtime, self.chunks, self.optimizer)
        phase = next(iter(config.data.phases.values()))
        self.planned = PlannedStep(
            0, "bench", 0, phase.global_batch_size, phase.micro_batch_size, phase.seq_length, 1e-4, 0.0
        )
        self.loop = SimpleNamespace(state=TrainState(), emit=lambda *args: None)
        watchdog = Watchdog(config.guards, directory, runtime)
        self.guards = Guards(
            config, directory, runtime, self.models, self.chunks, self.optimizer, self.stepper, None, self.loop.state,
            watchdog,
        )  # fmt: skip
        # Comparisons of replicas are timed apart.
        self.callbacks = [c for c in self.guards.callbacks if type(c).__name__ != "DriftGuard"]
        generator = torch.Generator().manual_seed(runtime.data_parallel_rank)
        per_rank = phase.global_batch_size // phase.micro_batch_size // runtime.data_parallel_size
        self.batches = [self._random(generator, config.model.vocab_size) for _ in range(per_rank)]

    def _random(self, generator, vocab_size: int) -> dict:
        shape = (self.planned.micro_batch_size, self.planned.seq_length + 1)
        tokens = torch.randint(1, vocab_size, shape, generator=generator)
        batch = {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
        if self.runtime.device.type == "cuda":
            batch = {key: value.pin_memory() for key, value in batch.items()}
        return batch

    def guarded(self) -> None:
        metrics = SimpleNamespace(rank_seconds=(), step=self.loop.state.step)
        for callback in self.callbacks:
            callback.on_step_start(self.loop)
        for callback in self.callbacks:
            callback.on_batch_loaded(self.loop)
        result = self.guards.step(self.planned, self.batches, (0, 0))
        assert result.action == "updated", result
        self.loop.state.advance(self.planned.batch_size, self.planned.seq_length)
        metrics.rank_seconds = result.rank_seconds
        for callback in self.callbacks:
            callback.on_step_end(self.loop, metrics)

    def own_seconds(self, count: int = 500) -> float:
        """CPU time of this thread that the guards' own code takes a step: all of :meth:`guarded` without training."""
        gradients = self.stepper.gradients(self.batches, (0, 0))
        stepper, rng = self.stepper, random.Random(0)
        varied = [replace(gradients, loss=gradients.loss + rng.gauss(0, 0.02)) for _ in range(97)]
        turns = itertools.cycle(varied)
        trains = stepper.step
        stepper.step = lambda *args: (next(turns), True)
        before = time.thread_time()
        for _ in range(count):
            self.guarded()
        seconds = (time.thread_time() - before) / count
        stepper.step = trains
        return seconds

    def bare(self) -> None:
        assert self.stepper.train(self.batches, (0, 0)).action == "updated"

    def seconds(self, step, count: int) -> float:
        """Of one step, mean over ``count`` of them."""
        self._wait()
        before = time.perf_counter()
        for _ in range(count):
            step()
        self._wait()
        return (time.perf_counter() - before) / count

    def _wait(self) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()

    def comparison(self) -> None:
        """What a comparison of replicas computes on this rank, and the host's wait."""
        with torch.no_grad():
            sums = [checksum(replica.tensor) for replica in replicas_of(self.models, self.optimizer)]
            torch.stack(sums).tolist()


def measure(bench: Bench, pairs: int, steps: int) -> dict:
    """Numbers of the table; seconds are medians of this rank."""
    for _ in range(max(3, bench.config.guards.min_window_steps)):
        bench.guarded()  # warm-up, and a history long enough that spikes are looked for
    bench.seconds(bench.bare, 2)
    with_guards, without, overheads = [], [], []
    for pair in range(pairs):
        times = {}
        for step in (bench.guarded, bench.bare) if pair % 2 else (bench.bare, bench.guarded):
            times[step.__name__] = bench.seconds(step, steps)
        with_guards.append(times["guarded"])
        without.append(times["bare"])
        overheads.append(times["guarded"] / times["bare"] - 1)
    low, middle, high = statistics.quantiles(overheads, n=4)
    own = bench.own_seconds()
    bench.comparison()
    comparison = statistics.median(bench.seconds(bench.comparison, 1) for _ in range(5))
    interval, step = bench.config.guards.drift_interval, statistics.median(without)
    return {
        "device": torch.cuda.get_device_name() if bench.runtime.device.type == "cuda" else "CPU",
        "ranks": bench.runtime.world_size,
        "pairs": pairs,
        "steps_per_block": steps,
        "seconds_without": step,
        "seconds_with": statistics.median(with_guards),
        "overhead_percent": {"median": 100 * middle, "quartiles": [100 * low, 100 * high]},
        "own_seconds": own,
        "own_percent": 100 * own / step,
        "comparison_seconds": comparison,
        "comparison_percent_amortised": 100 * comparison / (interval * step) if interval else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as of hymba train; default: " + " ".join(DEFAULT))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="steps in a block")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(args.overrides or DEFAULT, Path(directory))
        try:
            result = measure(bench, args.pairs, args.steps)
        finally:
            for callback in bench.callbacks:
                callback.close()
    if bench.runtime.rank == 0:
        print(json.dumps(result, indent=1))
    shutdown()


if __name__ == "__main__":
    main()
