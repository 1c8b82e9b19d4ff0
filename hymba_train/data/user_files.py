"""Writing a user's own files: whole or not at all, and an error is the user's to mend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from hymba_train.errors import UserError
from hymba_train.files import replacing


@contextlib.contextmanager
def replacing_or_refused(path: Path) -> Iterator[Path]:
    """:func:`hymba_train.files.replacing`; an OSError is a UserError that names the file."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); nothing of it was kept") from error


def write_or_refuse(path: Path, content: bytes) -> None:
    """Write ``content`` so that ``path`` holds either its old bytes or all the new ones. Raises UserError."""
    with replacing_or_refused(path) as temporary:
        temporary.write_bytes(content)
