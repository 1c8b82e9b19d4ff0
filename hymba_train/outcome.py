"""How processes of different kinds tell each other about a run: two small files in its run directory.

Whoever wants a run to stop writes ``stop_requested`` (its text is the reason). How the last process of a run ended is
left in ``outcome``, one line::

    finished STEP
    stopped STEP REASON
    failed STEP REASON     (a guard ended the run: to start it again unchanged would be in vain)

Written and read by training, guards, launchers and ``hymba runs``. Free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hymba_train.files import write_atomically

STOP_FILE = "stop_requested"
OUTCOME_FILE = "outcome"


@dataclass(frozen=True)
class Outcome:
    """How the last process of a run ended."""

    finished: bool  # else stopped early, or failed
    step: int
    reason: str
    failed: bool = False  # ended by a guard


def request_stop(directory: Path, reason: str) -> None:
    """Ask a run to save and stop, from any process that sees its run directory."""
    write_atomically(directory / STOP_FILE, reason + "\n")


def write_outcome(directory: Path, word: str, step: int, reason: str) -> None:
    """``word``: finished | stopped | failed."""
    write_atomically(directory / OUTCOME_FILE, f"{word} {step} {' '.join(reason.split())}\n")


def clear(directory: Path) -> None:
    """Forget earlier requests and outcomes; call before a start."""
    for name in (STOP_FILE, OUTCOME_FILE):
        (directory / name).unlink(missing_ok=True)


def read_outcome(directory: Path) -> Outcome | None:
    """How the last process of a run ended; None if it runs, or died."""
    word, _, rest = first_line(directory / OUTCOME_FILE).partition(" ")
    step, _, reason = rest.partition(" ")
    if word not in ("finished", "stopped", "failed") or not step.isdigit():
        return None
    return Outcome(word == "finished", int(step), reason, word == "failed")


def first_line(path: Path) -> str:
    """Without the space around it; empty if there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return lines[0].strip() if lines else ""
