"""What the processes that tests start are given."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment with the repository first on PYTHONPATH, before what was there: where packages are
    installed beside Python, a child needs it to find them. ``changes`` replace other variables."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **changes}
