"""A virtual environment that holds torch, transformers and what these need, and nothing else: the machine of somebody
who has never heard of this project.

What is installed beside the tests is linked into it, so that making one takes a second and no network. Another version
of transformers comes from the package index.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import venv
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def make_venv(directory: Path, transformers: str | None = None) -> Path:
    """Make it in ``directory``; returns its python. ``transformers``: install that version; None: link the one here.

    Raises RuntimeError, with pip's last line, if the version cannot be had.
    """
    venv.create(directory, with_pip=False, symlinks=True)
    python = directory / "bin" / "python"
    site = next(directory.glob("lib/python*/site-packages"))
    # Beside site-packages and not in it: pip leaves alone what is outside of the environment.
    links = directory / "links"
    links.mkdir()
    for name in _needed("torch", "numpy", *([] if transformers else ["transformers"])):
        _link(name, links)
    (site / "links.pth").write_text(f"{links}\n")
    if transformers:
        command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
        done = subprocess.run(
            [*command, f"transformers=={transformers}"], capture_output=True, text=True, check=False, env=clean_env()
        )
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["pip failed"]
            raise RuntimeError(lines[-1])
    return python


def clean_env() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HYMBA"))}


def _needed(*names: str) -> set[str]:
    """The distributions and, of those that are installed, all that they require."""
    found: set[str] = set()
    left = [canonicalize_name(name) for name in names]
    while left:
        name = left.pop()
        if name in found:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        needs = [Requirement(line) for line in requires]
        left += [canonicalize_name(r.name) for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def _link(name: str, links: Path) -> None:
    distribution = importlib.metadata.distribution(name)
    tops = {Path(file).parts[0] for file in distribution.files or ()}
    for top in tops - {"..", "__pycache__", "/"}:
        target = Path(distribution.locate_file(top)).resolve()
        if target.suffix != ".pth" and target.exists() and not (links / top).exists():
            (links / top).symlink_to(target)
