"""One run in one line: state, step, loss, newest checkpoint, restarts, goodput."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from hymba_train.callbacks.jsonl import METRICS, Line, counting, read_lines
from hymba_train.callbacks.progress import format_seconds
from hymba_train.checkpoint import directory as checkpoints
from hymba_train.checkpoint import manifest
from hymba_train.config import FROZEN_NAME, load_frozen
from hymba_train.errors import UserError
from hymba_train.outcome import read_outcome
from hymba_train.plan import plan_steps
from hymba_train.runs.metrics import goodput
from hymba_train.runs.slurm_jobs import in_queue, launches

SILENT_AFTER_SECONDS = 300  # or ten logged intervals, if that is longer


@dataclass(frozen=True)
class RunSummary:
    """What `hymba runs list` shows of a run."""

    name: str
    state: str
    step: int
    num_steps: int | None  # of the whole run; None if its configuration cannot be read
    tokens: int
    loss: float | None  # training loss of the last logged step
    checkpoint: int | None  # step of the newest complete checkpoint
    verified: bool | None  # whether every file of it has the checksum it was published with; None: not looked
    remarks: tuple[str, ...]  # what is wrong with the checkpoints
    restarts: int
    goodput: float | None  # 0..1


def find_runs(root: Path) -> list[Path]:
    """Run directories in ``root``, by name: those that hold a frozen configuration. A name may be two deep
    (``ablation/a1``); deeper is not looked, for a run's own directories may be vast. Raises UserError."""
    if not root.is_dir():
        raise UserError(f"--directory {root}: no such directory; give the run.directory of your runs")
    return sorted(path.parent for depth in ("*", "*/*") for path in root.glob(f"{depth}/{FROZEN_NAME}"))


def summarize(run: Path, root: Path, now: float | None = None, verify: bool = False) -> RunSummary:
    """Read a run directory; ``now`` in seconds since 1970. ``verify`` reads all of the newest checkpoint."""
    now = time.time() if now is None else now
    lines = read_lines(run / METRICS)
    last_sign = (run / METRICS).stat().st_mtime if lines else 0.0
    train = counting(lines, "train")
    newest, remarks = checkpoints.newest(run / checkpoints.CHECKPOINTS)
    damage = manifest.verify(newest) if newest and verify else []
    starts = [line for line in lines if line["event"] == "start"]
    last = train[-1] if train else starts[-1] if starts else {"step": 0, "tokens": 0}
    return RunSummary(
        name=str(run.relative_to(root)), state=state_of(run, lines, last_sign, now), step=last["step"],
        num_steps=_num_steps(run), tokens=last["tokens"], loss=last.get("loss"),
        checkpoint=checkpoints.step_of(newest) if newest else None,
        verified=not damage if newest and verify else None, remarks=(*remarks, *damage),
        restarts=max(len(starts) - 1, 0), goodput=goodput(lines, last_sign),
    )  # fmt: skip


def state_of(run: Path, lines: list[Line], last_sign: float, now: float) -> str:
    """finished | stopped (REASON) | ended by a guard (REASON) | failed (ERROR) | job N pending ... | running |
    silent for TIME | not started."""
    outcome = read_outcome(run)
    if outcome is not None:
        if outcome.failed:
            return f"ended by a guard ({outcome.reason})"
        return "finished" if outcome.finished else f"stopped ({outcome.reason})"
    job = _job_state(run)
    if job is not None and not job.endswith("running"):
        return job
    if not lines:
        return job or "not started"
    if lines[-1]["event"] == "end":
        return f"failed ({str(lines[-1].get('reason', '?'))[:60]})"
    train = [line for line in lines if line["event"] == "train"]
    interval = 0.0
    if len(train) > 1:
        interval = abs(train[-1]["step"] - train[-2]["step"]) * train[-1]["step_seconds"]
    quiet = now - last_sign
    if quiet > max(SILENT_AFTER_SECONDS, 10 * interval):
        return f"silent for {format_seconds(quiet)}" + (f" ({job})" if job else "")
    return job or "running"


def _job_state(run: Path) -> str | None:
    """'job 12 pending' while Slurm has a job of this run."""
    submitted = launches(run)
    if not submitted or shutil.which("squeue") is None:
        return None
    for job_id in reversed(submitted[-1].get("jobs", [])):
        try:
            job = in_queue(str(job_id))
        except UserError:  # of a summary, the queue is the least part
            return None
        if job is not None:
            return f"job {job[0]} {job[1].lower()}"
    return None


def _num_steps(run: Path) -> int | None:
    try:
        config = load_frozen(run / FROZEN_NAME)
        steps = plan_steps(config.data.phases).num_steps
    except (UserError, TypeError, ValueError, ZeroDivisionError):  # written by another version, or edited
        return None
    return steps if config.run.train_steps is None else min(steps, config.run.train_steps)
