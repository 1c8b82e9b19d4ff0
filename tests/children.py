"""Processes that tests start: what they are given, which of their children are forks, whether they have ended."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment with the repository first on PYTHONPATH, before what was there: where packages are
    installed beside Python, a child needs it to find them. ``changes`` replace other variables."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **changes}


def forks_of(process: psutil.Process) -> list[psutil.Process]:
    """Children that run what their parent runs: of a rank the writers of its saves, not its monitor."""
    return [child for child in process.children() if child.cmdline() == process.cmdline()]


def has_ended(process: psutil.Process) -> bool:
    """Also of one that nobody has waited for yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
