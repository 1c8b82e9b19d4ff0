"""Things that go wrong in a training, each once; called in its process (``patch`` of :meth:`warm.Warm.train`)."""

from __future__ import annotations

import importlib
import os
import signal
import threading
import time
from pathlib import Path


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _strike(marker: str) -> bool:
    """Whether this is the first time; notes it."""
    try:
        Path(marker).open("x").close()
    except FileExistsError:
        return False
    return True


def kill_at_step(rank: int, step: int, delay_seconds: float, marker: str) -> None:
    """SIGKILL to ``rank`` so long after the start of the step after ``step``."""
    from hymba_train.callbacks.base import Callback
    from hymba_train.train import main as training

    class KillAtStep(Callback):
        def on_step_start(self, loop) -> None:
            if loop.state.step == step and _strike(marker):
                threading.Timer(delay_seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    if _rank() == rank:
        build = training.build_callbacks
        training.build_callbacks = lambda *args, **kwargs: [*build(*args, **kwargs), KillAtStep()]


def slow(module: str, name: str, call: int, seconds: float, marker: str, rank: int = 0) -> None:
    """On ``rank``, the so-manieth call of a function touches ``marker`` and then takes ``seconds`` longer."""
    if _rank() != rank:
        return
    owner = importlib.import_module(module)
    *path, leaf = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, leaf), 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call and _strike(marker):
            time.sleep(seconds)
        return original(*args, **kwargs)

    setattr(owner, leaf, wrapped)


def writer(rank: int, how: str, marker: str) -> None:
    """The process that writes for ``rank`` raises, exits with 17, or is killed; those of other ranks take a minute."""
    from hymba_train.checkpoint import save

    def broken(share, path, who) -> None:
        if who != rank:
            time.sleep(60)
        Path(marker).write_text(repr(time.time()))
        if how == "raise":
            raise ValueError("a broken writer")
        if how == "exit":
            os._exit(17)
        os.kill(os.getpid(), signal.SIGKILL)

    save.write_share = broken


def note_errors(directory: str) -> None:
    """Every rank leaves ``error.RANK`` with the time at which it learnt of an error."""
    from hymba_train.errors import UserError
    from hymba_train.train import main as training

    train = training.train

    def noting(*args):
        try:
            return train(*args)
        except UserError:
            (Path(directory) / f"error.{_rank()}").write_text(repr(time.time()))
            raise

    training.train = noting
