"""Slurm jobs of a run: what `hymba launch slurm` has noted of them, and what the queue says. Free of torch."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from hymba_train.errors import UserError

SLURM = "slurm"  # directory in a run directory: slurm/0001/ is the first launch, with its script, logs and counts
LAUNCH_FILE = "launch.json"
SQUEUE_SECONDS = 10


def launches(run: Path) -> list[dict[str, Any]]:
    """What `hymba launch slurm` has submitted for this run, oldest first; files that cannot be read are left out."""
    found = []
    for file in sorted((run / SLURM).glob(f"*/{LAUNCH_FILE}")):
        try:
            launch = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(launch, dict):
            found.append(launch)
    return found


def in_queue(job_id: str) -> tuple[str, str] | None:
    """(id, state in capitals) while Slurm has the job, else None. One job a call: squeue fails altogether for an id
    that it has forgotten. Raises UserError if it does not answer."""
    command = ["squeue", "-h", "-j", job_id, "-o", "%i %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"squeue: no answer within {SQUEUE_SECONDS} s; try again") from error
    if done.returncode or not done.stdout.strip():
        return None
    number, state = done.stdout.split()[:2]
    return number, state
