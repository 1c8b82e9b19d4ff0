"""Training the runs of a comparison on this machine, so many at a time, until they are done or time is up."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess

from hymba_train.callbacks.jsonl import METRICS, counting, read_lines
from hymba_train.compare.child import PRELOAD, SERVER, last_line, train_run
from hymba_train.compare.study import Run
from hymba_train.config import freeze_run
from hymba_train.errors import UserError
from hymba_train.exit_codes import STOPPED_EARLY
from hymba_train.outcome import clear, read_outcome, request_stop

LOG = "output.log"
LOOK_SECONDS = 0.2
STATUS_SECONDS = 60.0
KILLED = "had no time left to save; it goes on from its newest checkpoint"


@dataclass
class Clock:
    """When runs are asked to stop, and when those that have not stopped are ended."""

    limit_seconds: float | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def margin_seconds(self) -> float:
        """For saving, and for the table."""
        return min(45.0, max(3.0, 0.1 * (self.limit_seconds or 0.0)))

    def left(self) -> float:
        """Seconds until runs must be asked to stop."""
        if self.limit_seconds is None:
            return float("inf")
        return self.limit_seconds - self.margin_seconds - self.elapsed()

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def is_over(self) -> bool:
        """Whether nobody can wait any longer."""
        return self.left() < -0.7 * self.margin_seconds


def is_finished(run: Run) -> bool:
    outcome = read_outcome(run.directory)
    return outcome is not None and outcome.finished


class Pool:
    """``say`` gets a line for everything that happens. ``fresh``: no fork server, an interpreter for each run."""

    def __init__(self, num_jobs: int, clock: Clock, say: Callable[[str], None], fresh: bool = False) -> None:
        self.num_jobs, self.clock, self.say, self.fresh = num_jobs, clock, say, fresh
        self.failures: dict[str, str] = {}
        self._stopping = ""
        self._running: dict[Run, BaseProcess] = {}
        self._ended: set[Run] = set()  # by us, because nobody could wait for them

    def train(self, runs: Sequence[Run]) -> dict[str, str]:
        """Train what is not finished. Returns name -> reason of the runs that failed; one that was stopped has not."""
        waiting = [run for run in runs if not is_finished(run)]
        waiting.sort(key=lambda run: not (run.directory / METRICS).exists())  # first what was begun
        for run in runs:
            if run not in waiting:
                self.say(f"{run.name}: finished before")
        if not waiting:
            return self.failures
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([SERVER] if self.fresh else [SERVER, *PRELOAD])
        # Asking CUDA how many GPUs there are would spoil it for forks; NVML tells as well.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.num_jobs)))
        next_status = self.clock.elapsed() + STATUS_SECONDS
        with self._signals():
            try:
                while waiting or self._running:
                    self._start(waiting, context)
                    self._reap()
                    self._stop_in_time()
                    if self._stopping and waiting:
                        self.say(f"{len(waiting)} not started ({self._stopping}): {', '.join(r.name for r in waiting)}")
                        waiting = []
                    if self.clock.elapsed() > next_status:
                        next_status += STATUS_SECONDS
                        self.say("  ".join(f"{run.name} {_where(run)}" for run in self._running))
                    time.sleep(LOOK_SECONDS)
            finally:
                self._end_all()
        return self.failures

    def _start(self, waiting: list[Run], context: ForkServerContext) -> None:
        while waiting and len(self._running) < self.num_jobs and not self._stopping:
            run = waiting.pop(0)
            try:
                resolved, _ = freeze_run(run.config)
            except UserError as error:
                self._failed(run, str(error))
                continue
            clear(run.directory)
            arguments = (str(resolved), str(run.directory / LOG), self.fresh)
            process = context.Process(target=train_run, args=arguments)
            process.start()
            self._running[run] = process
            self._tell_if_stopping(run)  # a signal may have come in between, and asked the others
            self.say(f"{run.name}: started, {_where(run)}")

    def _tell_if_stopping(self, run: Run) -> None:
        if self._stopping:
            request_stop(run.directory, self._stopping)

    def _reap(self) -> None:
        for run, process in list(self._running.items()):
            if process.is_alive():
                continue
            process.join()
            del self._running[run]
            code = process.exitcode
            if code == 0 and is_finished(run):
                self.say(f"{run.name}: finished")
            elif code == STOPPED_EARLY:
                self.say(f"{run.name}: saved and stopped, {_where(run)}")
            elif code == -signal.SIGKILL and run in self._ended:
                self.say(f"{run.name}: {KILLED}")
            else:
                self._failed(run, f"exit code {code}: {last_line(run.directory / LOG)}")

    def _failed(self, run: Run, reason: str) -> None:
        self.failures[run.name] = reason
        self.say(f"{run.name}: FAILED ({reason}); see {run.directory / LOG}")

    def _stop_in_time(self) -> None:
        if not self._stopping and self.clock.left() <= 0:
            self._stopping = f"--time-limit {self.clock.limit_seconds:.0f}"
            self._ask_to_stop()
        if self.clock.is_over():
            self._end_all()

    def _end_all(self) -> None:
        for run, process in self._running.items():
            process.kill()
            self._ended.add(run)

    def _ask_to_stop(self) -> None:
        for run in self._running:
            request_stop(run.directory, self._stopping)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM has all runs save and stop, a second one ends them."""

        def handle(number: int, frame: object) -> None:
            if self._stopping:
                self._end_all()
                return
            self._stopping = signal.Signals(number).name
            self._ask_to_stop()

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _where(run: Run) -> str:
    train = counting(read_lines(run.directory / METRICS), "train")
    return f"step {train[-1]['step']}" if train else "from the beginning"
