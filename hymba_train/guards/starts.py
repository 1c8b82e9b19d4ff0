"""starts.jsonl in the run directory: from which step each process began, so that nothing starts over for ever.

The launchers count starts, too, but only those that they make themselves; ``torchrun --max-restarts`` and schedulers of
other kinds make others. Free of torch.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hymba_train.callbacks.base import Callback
from hymba_train.json_lines import open_to_append, read_json_lines
from hymba_train.outcome import OUTCOME_FILE, read_outcome

if TYPE_CHECKING:
    from hymba_train.train.loop import Loop

STARTS = "starts.jsonl"


def failed_before(directory: Path) -> str | None:
    """Why there is no use in going on: torchrun starts again what a guard has ended. None for any other start."""
    if _restart() == 0:
        return None
    outcome = read_outcome(directory)
    return outcome.reason if outcome is not None and outcome.failed else None


def forget_earlier_outcome(directory: Path) -> None:
    """Remove what an earlier job has left as the outcome, when a job begins: should this process die before it trains,
    its restart must not take that for a verdict on itself. Call with the run's lock held."""
    if _restart() == 0:
        (directory / OUTCOME_FILE).unlink(missing_ok=True)


def _restart() -> int:
    """How often torchrun has started this process again; 0 at first, and without torchrun."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") or 0)


def too_many_starts(directory: Path, from_step: int, limit: int) -> str | None:
    """Why a start from ``from_step`` is refused: the last ``limit`` ones were from there, too, and all were cut off.

    A process that ended in good order makes a new beginning, and so does one that starts from another step.
    """
    same = 0
    for record in reversed(read_json_lines(directory / STARTS)):
        if record.get("from_step") != from_step:
            break
        same += 1
    if same < limit:
        return None
    return (
        f"{same} starts in a row from step {from_step} were cut off before the next checkpoint; find the cause in the "
        f"logs, or save more often; delete {directory / STARTS} to try again"
    )


class Starts(Callback):
    """On the first rank: notes this process's start, and its end if that is in good order."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / STARTS

    def on_train_start(self, loop: Loop) -> None:
        self._write({"from_step": loop.state.step, "time": time.time(), "pid": os.getpid(), "restart": _restart()})

    def on_train_end(self, loop: Loop) -> None:
        self._write({"ended_at": loop.state.step, "time": time.time()})

    def _write(self, record: dict) -> None:
        with open_to_append(self.path) as file:
            file.write(json.dumps(record) + "\n")
