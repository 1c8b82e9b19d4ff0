"""The .json beside a .bin/.idx pair: what was tokenised, with which tokenizer, and what the files must hash to.

Written last, so a pair with a manifest is complete. It holds no times and no machine names: the same input and
options give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hymba_train.data.indexed import sync_directory, temporary_path
from hymba_train.errors import UserError

MANIFEST_VERSION = 1


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.json")


@dataclass
class Manifest:
    """Facts about one .bin/.idx pair."""

    num_tokens: int
    num_documents: int
    dtype: str
    max_token_id: int
    """-1 when there are no tokens."""
    append_eod: bool
    tokenizer: dict[str, Any]
    """sha256, vocab_size, eod_id and the file's name."""
    files: dict[str, dict[str, Any]]
    """File name -> bytes, sha256."""
    inputs: list[dict[str, Any]]
    """Per input file: name, lines, text_bytes, sha256 of the (uncompressed) lines."""
    json_key: str = "text"
    shuffle_seed: int | None = None
    num_empty_documents: int = 0
    """Documents without a single token; they are left out."""
    bad_lines: list[str] = field(default_factory=list)
    """file:line: reason, of each line skipped under --skip-bad-lines."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the software that wrote the files."""
    version: int = MANIFEST_VERSION

    def write(self, prefix: str | Path) -> Path:
        """Write PREFIX.json by temporary name, fsync and rename."""
        path = manifest_path(prefix)
        write_atomically(path, json.dumps(asdict(self), indent=1, sort_keys=True).encode() + b"\n")
        return path


def read_manifest(prefix: str | Path) -> Manifest | None:
    """Manifest of a pair, or None when it has none (files written by Megatron). Raises UserError if it is broken."""
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        manifest = Manifest(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a manifest of this version ({error}): tokenise the source again") from error
    if manifest.version != MANIFEST_VERSION:
        raise UserError(f"{path} has manifest version {manifest.version}, this software reads {MANIFEST_VERSION}")
    return manifest


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` so that ``path`` holds either its old bytes or all the new ones."""
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def file_sha256(path: str | Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
