"""Step time and days from measured speeds (measured.yaml beside this file). Free of torch.

A row covers a phase if GPU, model, precision, sequence length, micro-batch, tensor parallelism and recomputation are
its own. Pipeline stages are reckoned: a step takes longer by the bubble and by the busiest stage over the mean. What
the network costs is not in it. Nothing else is extrapolated.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_train.config.schema import Config, PhaseConfig
from hymba_train.errors import UserError

if TYPE_CHECKING:
    from hymba_train.plan.plan import PhasePlan, Plan

TABLE = Path(__file__).with_name("measured.yaml")
DAY_SECONDS = 86400


@dataclass(frozen=True)
class Row:
    """One measurement; measured.yaml says what each field means."""

    gpu: str
    model: str
    precision: str
    seq_length: int
    micro_batch_size: int
    tensor: int
    recompute: str
    tokens_per_second: float
    peak_gib: float | None
    commit: str
    date: str

    def is_of(self, gpu: str) -> bool:
        """Whether this GPU, by whatever name (H200, NVIDIA H200), is the row's."""
        words = re.escape(self.gpu)
        return re.search(rf"(?<!\w){words}(?!\w)", gpu, re.IGNORECASE) is not None

    @property
    def setting(self) -> tuple[Any, ...]:
        return self.model, self.precision, self.seq_length, self.micro_batch_size, self.tensor, self.recompute


@cache
def measured_rows(path: Path = TABLE) -> tuple[Row, ...]:
    """Rows of the table. Raises UserError, one line a problem, if a row is not as its head describes."""
    import yaml

    plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows, problems = [], []
    for number, entry in enumerate(plain.get("rows") or []):
        try:
            rows.append(_row(entry))
        except (TypeError, ValueError) as error:
            problems.append(f"{path}: row {number}: {error}")
    if problems:
        raise UserError(*problems)
    return tuple(rows)


def _row(entry: Any) -> Row:
    """Raises ValueError or TypeError."""
    names = {f.name for f in fields(Row)}
    if not isinstance(entry, dict) or set(entry) != names:
        raise ValueError(f"has {sorted(entry)}, wants {sorted(names)}")
    row = Row(**{**entry, "commit": str(entry["commit"]), "date": str(entry["date"])})
    datetime.date.fromisoformat(row.date)
    if not row.tokens_per_second > 0:
        raise ValueError(f"tokens_per_second={row.tokens_per_second} must be above 0")
    if not re.fullmatch(r"[0-9a-f]{7,40}", row.commit):
        raise ValueError(f"commit={row.commit!r} is no commit; quote it if it looks like a number")
    return row


def precision_name(config: Config) -> str:
    """How the table names a run's precision: bf16, fp8-delayed."""
    return f"fp8-{config.precision.fp8}" if config.precision.fp8 else config.precision.params


def row_for(config: Config, phase: PhaseConfig, gpu: str, rows: Sequence[Row]) -> Row | None:
    """The newest row that covers a phase on a GPU; None: not measured."""
    wanted = (
        config.model.name, precision_name(config), phase.seq_length, phase.micro_batch_size, config.parallel.tensor,
        config.parallel.recompute,
    )  # fmt: skip
    found = [row for row in rows if row.setting == wanted and row.is_of(gpu)]
    return max(found, key=lambda row: row.date, default=None)


@dataclass(frozen=True)
class PhaseTime:
    """Reckoned time of one phase. All None where nothing was measured."""

    phase: str
    step_seconds: float | None  # at the full batch size
    seconds: float | None  # of all steps
    row: Row | None


@dataclass(frozen=True)
class TimeEstimate:
    """Time of a run on one kind of GPU."""

    gpu: str
    phases: tuple[PhaseTime, ...]

    @property
    def days(self) -> float | None:
        """Of all phases together; None while one of them is not measured."""
        seconds = [phase.seconds for phase in self.phases if phase.seconds is not None]
        return sum(seconds) / DAY_SECONDS if seconds and len(seconds) == len(self.phases) else None


def estimate_times(plan: Plan, gpu: str | None = None, rows: Sequence[Row] | None = None) -> list[TimeEstimate]:
    """Time on ``gpu``; with None, on every GPU that was measured at all, or one estimate of nothing."""
    rows = measured_rows() if rows is None else rows
    gpus = [gpu] if gpu is not None else list(dict.fromkeys(row.gpu for row in rows)) or ["any GPU"]
    return [TimeEstimate(name, tuple(_phase_time(plan, phase, name, rows) for phase in plan.phases)) for name in gpus]


def _phase_time(plan: Plan, phase: PhasePlan, gpu: str, rows: Sequence[Row]) -> PhaseTime:
    row = row_for(plan.config, plan.config.data.phases[phase.name], gpu, rows)
    if row is None:
        return PhaseTime(phase.name, None, None, None)
    tokens_per_second = row.tokens_per_second * plan.world_size * (1 - phase.bubble_fraction) / plan.balance
    return PhaseTime(phase.name, phase.tokens_per_step / tokens_per_second, phase.num_tokens / tokens_per_second, row)
