"""Runs of tests.train.tiny_run in a process to which something happens.

::

    python -m tests.reliability.faulty_run DIRECTORY key=value ... [then key=value ...]

Beside the settings of a run these keys choose its fault; each happens once, at the first start that comes to it:

    fault.rank, fault.step, fault.delay_seconds   SIGKILL to this rank so long after the start of the step after `step`

Runs that have finished are left out when the process is started again.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

from hymba_train.callbacks.base import Callback
from hymba_train.outcome import read_outcome


class KillAtStep(Callback):
    def __init__(self, marker: Path, step: int, delay_seconds: float) -> None:
        self.marker, self.step, self.delay_seconds = marker, step, delay_seconds

    def on_step_start(self, loop) -> None:
        if loop.state.step == self.step and not self.marker.exists():
            self.marker.touch()
            threading.Timer(self.delay_seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def take_unfinished() -> dict[str, SimpleNamespace]:
    """Name -> fault of the command line's runs that have not finished; they alone stay on it, without their faults."""
    directory, kept, faults = Path(sys.argv[1]), [], {}
    for argument in " ".join(sys.argv[2:]).split(" then "):
        settings, fault = split_faults(argument)
        name = json.loads(dict(s.split("=", 1) for s in settings)["run.name"])
        outcome = read_outcome(directory / "runs" / name)
        if outcome is None or not outcome.finished:
            kept.append(" ".join(settings))
            faults[name] = fault
    sys.argv[2:] = " then ".join(kept).split(" ")
    return faults


def split_faults(argument: str) -> tuple[list[str], SimpleNamespace]:
    pairs = argument.split()
    faults = {k.removeprefix("fault."): json.loads(v) for k, v in (p.split("=", 1) for p in pairs if "fault." in p)}
    return [p for p in pairs if "fault." not in p], SimpleNamespace(**faults)


def main() -> int:
    import tests.train.tiny_run as tiny_run
    from hymba_train.train import main as training

    build, faults = training.build_callbacks, take_unfinished()
    if not faults:
        return 0
    killers = {
        name: KillAtStep(Path(sys.argv[1]) / f"{name}.killed", fault.step, fault.delay_seconds)
        for name, fault in faults.items()
        if hasattr(fault, "step") and fault.rank == int(os.environ.get("RANK", 0))
    }

    def build_with_killer(config, *args, **kwargs):
        killer = killers.get(config.run.name)
        return [*build(config, *args, **kwargs), *([killer] if killer else [])]

    training.build_callbacks = build_with_killer
    return tiny_run.main()


if __name__ == "__main__":
    sys.exit(main())
