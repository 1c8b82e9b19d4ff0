"""Exports to Hugging Face format while training goes on."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hymba_train.callbacks.base import Callback
from hymba_train.checkpoint.directory import is_complete, newest, published_step, step_name, step_of

if TYPE_CHECKING:
    from hymba_train.train.loop import Loop
    from hymba_train.train.metrics import StepMetrics

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_TOUCHES = 5.0
# Not `-m`: a rank that is killed takes its export along, which would go on writing where the next start writes anew.
_CODE = """\
import sys
from hymba_train.checkpoint.children import die_with
die_with(int(sys.argv.pop(1)))
from hymba_train.cli import main
sys.exit(main())
"""
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Export(Callback):
    """Writes ``directory/step_N`` from checkpoints, each in a process of its own that uses no GPU.

    For the first rank alone; wrap it in NeverFatal. Exported are the first checkpoint at or after every ``interval``-th
    step (0: none of these) and, when training has come to its end, the last one, for which the end waits, however long
    it takes. A checkpoint is held by hard links until it is exported, so that it may be deleted meanwhile. One export
    runs at a time, and ends with this process. One that was due and is missing when a process starts, because the one
    before has died, is made of the checkpoint which that process loads.

    Args:
        checkpoints: where the run's checkpoints lie; a process that finds nothing left to train exports the newest.
        touch: called now and then while the end waits: it gets on.
    """

    def __init__(
        self, directory: Path, interval: int, dtype: str | None = None, *, checkpoints: Path,
        touch: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.directory, self.interval, self.dtype, self.checkpoints = directory, interval, dtype, checkpoints
        self.touch = touch
        self._next = interval
        self._latest: tuple[Path, int] | None = None
        self._taken: set[int] = set()  # steps that this process has exported, or is about to
        self._waiting: list[tuple[Path, int]] = []  # (held checkpoint, step)
        self._running: tuple[subprocess.Popen, Path, int] | None = None

    def on_train_start(self, loop: Loop) -> None:
        _remove_leftovers(self.directory)
        if self.interval:
            self._next = (loop.state.step // self.interval + 1) * self.interval
            self._make_up_for(loop.state.step)
            self._poll()

    def on_checkpoint_saved(self, loop: Loop, path: Path, step: int) -> None:
        self._latest = (path, step)
        if self.interval and step >= self._next:
            self._next = (step // self.interval + 1) * self.interval
            self._hold(path, step)
        self._poll()

    def on_step_end(self, loop: Loop, metrics: StepMetrics) -> None:
        self._poll()

    def on_train_end(self, loop: Loop) -> None:
        """Exports the last checkpoint and waits, unless something cut training short: then time may be scarce."""
        if loop.finished:
            self._hold_last()
        while loop.finished and (self._waiting or self._running):
            self._poll()
            if self._running:
                self._wait()

    def _wait(self) -> None:
        assert self._running is not None
        while True:
            self.touch()
            try:
                self._running[0].wait(SECONDS_BETWEEN_TOUCHES)
                return
            except subprocess.TimeoutExpired:
                continue

    def close(self) -> None:
        if self._running:
            self._running[0].terminate()
            self._running[0].wait()
            logger.warning("export of step %d stopped with the training", self._running[2])
        self._running, self._waiting = None, []
        _remove_leftovers(self.directory)

    def _make_up_for(self, step: int) -> None:
        """Take the checkpoint of ``step``, from which this process starts, if an export was due at it or since the last
        interval before it, and none is there."""
        due = self._next - self.interval
        exported = [step_of(path) for path in self.directory.glob("step_*")]
        if due == 0 or any(found is not None and due <= found <= step for found in exported):
            return
        path = self.checkpoints / step_name(step)
        if is_complete(path):  # not if the run goes on from another run's checkpoint
            logger.info("the export due at step %d is missing: it is made of step %d", due, step)
            self._hold(path, step)

    def _hold_last(self) -> None:
        """The newest checkpoint, unless it has been taken; one of an earlier life only if that left no export."""
        if self._latest is None:
            path, _ = newest(self.checkpoints)
            if path is None or (self.directory / path.name).exists():
                return
            self._latest = path, published_step(path)
        if self._latest[1] not in self._taken:
            self._hold(*self._latest)

    def _hold(self, path: Path, step: int) -> None:
        self._taken.add(step)
        held = self.directory / f".held-{path.name}" / path.name
        held.mkdir(parents=True)
        try:
            for file in path.iterdir():
                try:
                    os.link(file, held / file.name)
                except OSError:  # another file system, or one without hard links
                    shutil.copyfile(file, held / file.name)
        except OSError as error:
            shutil.rmtree(held.parent, ignore_errors=True)
            logger.warning("step %d is not exported: %s", step, error)
        else:
            self._waiting.append((held, step))

    def _poll(self) -> None:
        if self._running and self._running[0].poll() is not None:
            process, held, step = self._running
            self._running = None
            shutil.rmtree(held.parent)
            output = self.directory / step_name(step)
            if process.returncode == 0:
                logger.info("exported %s", output)
            else:
                logger.warning("export of step %d failed: see %s", step, self._log(step))
        if self._waiting and not self._running:
            self._start(*self._waiting.pop(0))

    def _start(self, held: Path, step: int) -> None:
        output = self.directory / step_name(step)
        shutil.rmtree(output, ignore_errors=True)  # of an earlier life of this run
        command = [sys.executable, "-c", _CODE, str(os.getpid()), "convert", "to-hf"]
        command += ["--checkpoint", str(held), "--output", str(output)]
        if self.dtype:
            command += ["--dtype", self.dtype]
        if nice := shutil.which("nice"):
            command = [nice, "-n", "10", *command]
        env = {k: v for k, v in os.environ.items() if k not in _LAUNCHER}
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with open(self._log(step), "w", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        self._running = (process, held, step)

    def _log(self, step: int) -> Path:
        return self.directory / f"{step_name(step)}.log"


def _remove_leftovers(directory: Path) -> None:
    for pattern in (".held-*", ".step_*.incomplete-*"):
        for path in directory.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
