"""A rank's side of the watchdog: it says where it stands, and starts the process that watches it."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

import hymba_train
from hymba_train.callbacks.base import Callback
from hymba_train.config.schema import GuardsConfig
from hymba_train.exit_codes import HUNG
from hymba_train.guards import marks
from hymba_train.guards.monitor import DUMP_SIGNAL
from hymba_train.parallel.ranks import on_rank_0
from hymba_train.parallel.runtime import Runtime
from hymba_train.train.loop import Loop
from hymba_train.train.metrics import StepMetrics

HANGS = "hangs"
BEAT_SECONDS = 0.5


class Watchdog(Callback):
    """Marks where the rank stands, in a few bytes of memory that it shares with its monitor.

    First in the list of callbacks, so that a mark comes before what others do in the same hook. The monitor is started
    here and ends with :meth:`close`, or with this process. DUMP_SIGNAL (SIGUSR2) is used up for stacks.
    """

    def __init__(self, config: GuardsConfig, directory: Path, runtime: Runtime) -> None:
        assert config.hang_seconds is not None
        start = on_rank_0(lambda: f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        marks_fd, self._stacks_fd = marks.anonymous_file(), marks.anonymous_file()
        self.marks = marks.Marks(marks_fd, create=True)
        self._activity, self._step, self._slow_step = marks.STARTING, 0, True
        self._groups = {id(g): g for g in (dist.group.WORLD, *(getattr(runtime.groups, n) for n in ("tp", "pp", "dp")))}
        faulthandler.register(DUMP_SIGNAL, file=self._stacks_fd, all_threads=True, chain=False)
        self._move(marks.STARTING)
        facts = {
            "pid": os.getpid(), "rank": runtime.rank, "world_size": runtime.world_size, "marks_fd": marks_fd,
            "stacks_fd": self._stacks_fd, "main_thread": threading.main_thread().ident, "exit_code": HUNG,
            "fast_seconds": config.hang_seconds, "slow_seconds": max(config.hang_slow_seconds, config.hang_seconds),
            "directory": str((directory / HANGS / start).absolute()),
        }  # fmt: skip
        # Isolated and without site-packages: it starts in some 30 ms and takes 10 MB.
        root = str(Path(hymba_train.__file__).resolve().parent.parent)
        code = f"import sys; sys.path.append({root!r}); from hymba_train.guards.monitor import main; main()"
        self._monitor = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code, json.dumps(facts)], pass_fds=(marks_fd, self._stacks_fd),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(marks_fd)  # the mapping stays
        self._closed = threading.Event()
        self._beater = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._beater.start()

    def touch(self) -> None:
        """Within a long activity: it gets on."""
        self._move(self._activity)

    def _move(self, activity: int) -> None:
        self._activity = activity
        self.marks.move(self._step, activity)

    def _beat(self) -> None:
        """Shows that threads still get the interpreter, and obeys the monitor."""
        number = 0
        while not self._closed.wait(BEAT_SECONDS):
            number += 1
            self.marks.set("beat", number)
            with contextlib.suppress(Exception):  # not every backend counts
                counts = [group._get_sequence_number_for_group() for group in self._groups.values()]
                self.marks.set("collectives", sum(counts))
            order = self.marks.get("order")
            if order:
                os._exit(order)

    def on_phase_start(self, loop: Loop, phase: str) -> None:
        self._slow_step = True  # other lengths: kernels are compiled and tuned again

    def on_step_start(self, loop: Loop) -> None:
        self._step = loop.state.step + 1
        self._move(marks.FIRST_STEP if self._slow_step else marks.LOADING)

    def on_batch_loaded(self, loop: Loop) -> None:
        self._move(marks.FIRST_STEP if self._slow_step else marks.STEP)

    def on_step_end(self, loop: Loop, metrics: StepMetrics) -> None:
        self._slow_step = False
        self._move(marks.BETWEEN)

    def on_guard(self, loop: Loop, event: dict) -> None:
        self._move(marks.BETWEEN)  # a rewind may follow

    def on_evaluation_end(self, loop: Loop, result: object) -> None:
        self.touch()

    def on_checkpoint_saved(self, loop: Loop, path: Path, step: int) -> None:
        self.touch()

    def on_train_end(self, loop: Loop) -> None:
        self._move(marks.ENDING)

    def on_exception(self, loop: Loop, error: BaseException) -> None:
        self._move(marks.ENDING)

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._beater.join()
        self._monitor.kill()
        self._monitor.wait()
        faulthandler.unregister(DUMP_SIGNAL)
        os.close(self._stacks_fd)
