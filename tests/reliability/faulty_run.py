"""Runs of tests.train.tiny_run in a process to which something happens.

::

    python -m tests.reliability.faulty_run DIRECTORY key=value ... [then key=value ...]

Beside the settings of a run these keys choose its fault; each happens once, at the first start that comes to it:

    fault.rank, fault.step, fault.delay_seconds   SIGKILL to this rank so long after the start of the step after `step`
    fault.touch                                   SIGKILL at this many touches of the checkpoints by this process
    fault.in_writer=true                          counts in processes forked from it, and ends them instead
    fault.lie_about_room=true                     the file system says that it is empty

Runs that have finished are left out when the process is started again.
"""

from __future__ import annotations

import builtins
import itertools
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

from hymba_train.callbacks.base import Callback
from hymba_train.callbacks.stop_file import read_outcome

TOUCHES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fsync", "write"}


class KillAtStep(Callback):
    def __init__(self, marker: Path, step: int, delay_seconds: float) -> None:
        self.marker, self.step, self.delay_seconds = marker, step, delay_seconds

    def on_step_start(self, loop) -> None:
        if loop.state.step == self.step and not self.marker.exists():
            self.marker.touch()
            threading.Timer(self.delay_seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


class KillAtTouch:
    """Ends the process at the n-th time that it opens, makes, renames, deletes, writes or fsyncs below checkpoints/."""

    def __init__(self, touch: int, marker: Path, in_writer: bool) -> None:
        self.touch, self.marker, self.in_writer, self.parent = touch, marker, in_writer, os.getpid()
        self.counted = itertools.count(1)
        sys.addaudithook(lambda event, args: self.see(event, args[0] if args else ""))
        self._wrap_fsync()
        self._wrap_open()

    def see(self, event: str, path) -> None:
        if event not in TOUCHES or "/checkpoints/" not in os.fsdecode(path if not isinstance(path, int) else b""):
            return
        if self.in_writer == (os.getpid() == self.parent):
            return
        if next(self.counted) == self.touch:
            self.marker.write_text(f"{event} {os.fsdecode(path)}")
            os.kill(os.getpid(), signal.SIGKILL)

    def _wrap_fsync(self) -> None:
        fsync = os.fsync

        def seen(descriptor: int) -> None:
            self.see("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        os.fsync = seen

    def _wrap_open(self) -> None:
        """A write to a Python file counts before it is made: the file is there, its content is not."""
        original = builtins.open

        def seen(path, mode="r", *args, **kwargs):
            file = original(path, mode, *args, **kwargs)
            if isinstance(path, str | Path) and "/checkpoints/" in str(path) and set(mode) & set("wa+x"):
                self.see("write", str(path))
            return file

        builtins.open = seen


def split_faults(argument: str) -> tuple[list[str], SimpleNamespace]:
    pairs = argument.split()
    faults = {k.removeprefix("fault."): json.loads(v) for k, v in (p.split("=", 1) for p in pairs if "fault." in p)}
    return [p for p in pairs if "fault." not in p], SimpleNamespace(**faults)


def main() -> int:
    import tests.train.tiny_run as tiny_run
    from hymba_train.train import main as training

    directory = Path(sys.argv[1])
    build, kept, killers = training.build_callbacks, [], {}
    for argument in " ".join(sys.argv[2:]).split(" then "):
        settings, fault = split_faults(argument)
        name = json.loads(dict(s.split("=", 1) for s in settings)["run.name"])
        outcome = read_outcome(directory / "runs" / name)
        if outcome is not None and outcome.finished:
            continue
        kept.append(" ".join(settings))
        marker = directory / f"{name}.killed"
        if hasattr(fault, "step") and fault.rank == int(os.environ.get("RANK", 0)):
            killers[name] = KillAtStep(marker, fault.step, fault.delay_seconds)
        if hasattr(fault, "touch"):
            KillAtTouch(fault.touch, marker, getattr(fault, "in_writer", False))
        if hasattr(fault, "lie_about_room"):
            shutil.disk_usage = lambda path: SimpleNamespace(free=1 << 60)

    def build_with_killer(config, *args, **kwargs):
        killer = killers.get(config.run.name)
        return [*build(config, *args, **kwargs), *([killer] if killer else [])]

    training.build_callbacks = build_with_killer
    if not kept:
        return 0
    sys.argv[2:] = " then ".join(kept).split(" ")
    return tiny_run.main()


if __name__ == "__main__":
    sys.exit(main())
