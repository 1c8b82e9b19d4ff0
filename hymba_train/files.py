"""Files that are there whole or not at all, also after a crash: written beside their place, fsynced, renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write ``content`` (text: as UTF-8) so that a reader sees the old file or the new one. Raises OSError."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Name of a file to write, which takes the place of ``path`` at the end; it is removed after an exception."""
    temporary = temporary_path(path)
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def temporary_path(path: Path) -> Path:
    """Name beside ``path`` under which it is written; random, so that two writers do not meet."""
    return path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")


def temporaries_of(path: Path) -> list[Path]:
    """What processes that died have left beside ``path`` (or what one is writing there)."""
    return sorted(path.parent.glob(f"{path.name}.tmp-*"))


def sync_and_close(file: BinaryIO) -> None:
    """Bring what was written to the disk, and close."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def fsync(path: Path) -> None:
    """Bring a file's content to the disk, or a directory's: that is, what was renamed in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_private(directory: Path) -> None:
    """Make a directory that only its owner may look into (0700). One that is there keeps its mode."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
