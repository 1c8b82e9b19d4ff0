"""Step directories, and which of them is the newest.

::

    <run>/checkpoints/step_0001000/            published: complete, never written again
    <run>/checkpoints/step_0002000.incomplete/ being written, or left by a process that died
    <run>/checkpoints/latest                   the name of the newest published directory, replaced atomically

A checkpoint is published or it is not: everything is written into ``.incomplete``, described by a manifest of sizes and
checksums, fsynced, and renamed in one step; ``latest`` follows. No rename, no checkpoint. One process (rank 0) changes
the directory; all others only read.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from hymba_train.checkpoint import manifest
from hymba_train.files import fsync, make_private, temporaries_of, write_atomically

CHECKPOINTS = "checkpoints"
LATEST = "latest"
METADATA = "checkpoint.json"  # ours; after it only the manifest is written into a step directory
_STEP = re.compile(r"step_(\d{7,})")
_REQUIRED = (METADATA, "metadata.json", ".metadata")  # ours, Megatron-Core's, PyTorch's


def step_name(step: int) -> str:
    """
    >>> step_name(5)
    'step_0000005'
    """
    return f"step_{step:07d}"


def step_of(path: Path) -> int | None:
    """Step of a published directory by its name; None for any other name."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def published_step(path: Path) -> int:
    """:func:`step_of` a directory that is known to be published."""
    step = step_of(path)
    assert step is not None, path
    return step


def is_complete(path: Path) -> bool:
    """Whether ``path`` is a published step directory with the files that every checkpoint has."""
    return step_of(path) is not None and all((path / name).is_file() for name in _REQUIRED)


def complete_steps(root: Path) -> list[Path]:
    """Complete step directories below ``root``, oldest first. Others are ignored."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if is_complete(p)), key=published_step)


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """(checkpoint to resume from, remarks): what ``latest`` names; failing that, the newest complete directory.

    Remarks say why ``latest`` was not followed. (None, remarks) if there is no complete checkpoint.
    """
    steps = complete_steps(root)
    remarks: list[str] = []
    pointer = root / LATEST
    if pointer.exists():
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if _STEP.fullmatch(name) and is_complete(root / name):
            return root / name, remarks
        state = f"names {name!r}, which is no complete checkpoint" if name else "is empty"
        remarks.append(f"{pointer} {state}")
    elif steps:
        remarks.append(f"{pointer} is missing")
    if steps and remarks:
        remarks[-1] += f": taking the newest complete one, {steps[-1].name}"
    return (steps[-1] if steps else None), remarks


def older(path: Path) -> list[Path]:
    """Complete step directories beside ``path`` of earlier steps, newest first."""
    return [p for p in reversed(complete_steps(path.parent)) if published_step(p) < published_step(path)]


def steps_at(path: Path) -> list[Path]:
    """Step directories meant by ``path``: itself alone, or those of a run, the newest first and older ones after it."""
    if is_complete(path):
        return [path]
    for root in (path / CHECKPOINTS, path):
        found, _ = newest(root)
        if found is not None:
            return [found, *older(found)]
    return []


def has_any(root: Path) -> bool:
    """Whether anything below ``root`` shows that a checkpoint was once published here, readable or not."""
    return root.is_dir() and any(p.name == LATEST or step_of(p) is not None for p in root.iterdir())


def start_step(root: Path, step: int) -> Path:
    """Make the empty directory that ``step`` is written into; a leftover of the same name is removed first."""
    path = root / f"{step_name(step)}.incomplete"
    make_private(root)
    remove(path)
    path.mkdir(mode=0o700)
    return path


def publish(incomplete: Path) -> Path:
    """fsync everything, rename ``.incomplete`` to its final name, then point ``latest`` to it. Returns the new path.

    A manifest is written first unless there is one already, of which the caller vouches that it is true. If the name is
    taken (a run that was taken back to an older checkpoint), the old directory makes way first: nothing is ever written
    into a published directory.
    """
    final = incomplete.with_name(incomplete.name.removesuffix(".incomplete"))
    assert step_of(final) is not None and final != incomplete, incomplete
    if not (incomplete / manifest.MANIFEST).exists():
        manifest.write(incomplete, manifest.make(incomplete))
    for path in incomplete.rglob("*"):
        fsync(path)
    fsync(incomplete)
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():
        remove(replaced)
        os.rename(final, replaced)
    os.rename(incomplete, final)
    fsync(final.parent)
    write_atomically(final.parent / LATEST, final.name + "\n")
    manifest.remember(final)
    remove(replaced)
    return final


def prune(root: Path, keep_last: int, keep_every: int) -> list[Path]:
    """Delete published checkpoints that no rule keeps; returns those deleted.

    Kept: the ``keep_last`` newest complete ones, at least one; those of every ``keep_every``-th step; and what
    ``latest`` names. Only complete directories count, so a torn one never pushes out a good one. If none of these
    agrees with its manifest, the newest one that does is kept as well: the last checkpoint that can be loaded stays.
    Checkpoints that this process wrote or verified are not read again for that.
    """
    steps = complete_steps(root)
    keep = set(steps[-max(keep_last, 1) :])
    if keep_every:
        keep |= {p for p in steps if published_step(p) % keep_every == 0}
    current, _ = newest(root)
    if current is not None:
        keep.add(current)
    gone = [p for p in steps if p not in keep]
    if gone:
        good = next((p for p in sorted(keep, reverse=True) if not manifest.verify(p)), None)
        good = good or next((p for p in reversed(gone) if not manifest.verify(p)), None)
        gone = [p for p in gone if p != good]
    for path in gone:
        remove(path)
    return gone


def remove_leftovers(root: Path) -> list[Path]:
    """Delete what dead processes left: ``.incomplete``, ``.replaced`` and ``.deleted`` steps, a pointer's temporaries.
    Call while nothing is written."""
    if not root.is_dir():
        return []
    suffixes = (".incomplete", ".replaced", ".deleted")
    leftovers = [p for p in root.iterdir() if p.name.endswith(suffixes) and step_of(p.with_suffix("")) is not None]
    for path in leftovers:
        remove(path)
    for path in temporaries_of(root / LATEST):
        path.unlink()
    return leftovers


def remove(path: Path) -> None:
    """Delete a directory such that a death half-way leaves no directory that looks complete."""
    if not path.exists():
        return
    if step_of(path) is not None:
        doomed = path.with_name(path.name + ".deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        path = doomed
    shutil.rmtree(path)
