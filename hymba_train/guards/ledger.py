"""guards.json in the run directory: what a rewind must not forget, because checkpoints are older than it.

Samples that are left out from now on, and how often the run went back. Rank 0 writes; free of torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from hymba_train.errors import UserError
from hymba_train.files import write_atomically

LEDGER = "guards.json"


@dataclass(frozen=True)
class LeftOut:
    """Samples begin .. end - 1 of a phase, which no step trains on any more."""

    phase: int
    begin: int
    end: int
    step: int  # the step that was bad
    reason: str


class Ledger:
    """The file's content. Raises UserError if it cannot be read."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / LEDGER
        self.left_out: list[LeftOut] = []
        self.num_rewinds = 0
        if not self.path.exists():
            return
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            self.left_out = [LeftOut(**entry) for entry in saved["left_out"]]
            self.num_rewinds = int(saved["num_rewinds"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path}: cannot be read ({type(error).__name__}: {error}); repair it, or delete it to train on "
                "the samples that it leaves out"
            ) from error

    def find(self, phase: int, begin: int, end: int) -> LeftOut | None:
        """The first entry that has a sample in begin .. end - 1."""
        return next((e for e in self.left_out if e.phase == phase and e.begin < end and begin < e.end), None)

    def add_rewind(self, entry: LeftOut, write: bool) -> None:
        """Leave samples out and count one rewind. ``write``: on one rank."""
        self.left_out.append(entry)
        self.num_rewinds += 1
        if write:
            saved = {"num_rewinds": self.num_rewinds, "left_out": [asdict(e) for e in self.left_out]}
            write_atomically(self.path, json.dumps(saved, indent=1) + "\n")
