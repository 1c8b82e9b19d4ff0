"""The .json beside a .bin/.idx pair: what was tokenised, with which tokenizer, and what the files must hash to.

Written last, so a pair with a manifest is complete. It holds no times and no machine names: the same input and
options give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import orjson

from hymba_train.data.user_files import write_or_refuse
from hymba_train.errors import UserError

MANIFEST_VERSION = 2
NUM_SPOTS = 16
SPOT_BYTES = 2**16
_FORMAT = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE


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
    """File name -> bytes, sha256, spots: [byte offset, hash] of some blocks, see :func:`spot_hashes`."""
    inputs: list[dict[str, Any]]
    """Per input file: name, bytes and sha256 of the file as stored, its records (lines or rows), and text_bytes, the
    UTF-8 bytes of the texts that became documents."""
    json_key: str = "text"
    shuffle_seed: int | None = None
    num_empty_documents: int = 0
    """Documents without a single token; they are left out."""
    num_bad_lines: int = 0
    """Lines passed over. PREFIX.bad_lines.txt has file:line: reason of each."""
    backend: str = ""
    """Library that encoded: tokenizers, sentencepiece or gigatoken. The ids do not depend on it."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the software that wrote the files."""
    chat: dict[str, Any] | None = None
    """Of a source with a loss mask, which `hymba data chat` or `hymba data recall` made: kind (conversations | pairs |
    recall tasks), template (sha256), seq_length, too_long, num_too_long, num_cut, num_answer_tokens, and mask: bytes,
    sha256 and spots of PREFIX.mask. None: plain text."""
    version: int = MANIFEST_VERSION

    @property
    def documents_per_piece(self) -> int:
        """Documents that must stay together in a sequence: the two answers of a pair."""
        return 2 if self.chat is not None and self.chat["kind"] == "pairs" else 1

    def write(self, prefix: str | Path) -> Path:
        """Write PREFIX.json by temporary name, fsync and rename."""
        path = manifest_path(prefix)
        write_or_refuse(path, orjson.dumps(self, option=_FORMAT))
        return path

    def file(self, suffix: str) -> dict[str, Any]:
        """Facts of the file with this suffix, ".bin" or ".idx". By suffix: a renamed source is still the same."""
        return next(facts for name, facts in self.files.items() if Path(name).suffix == suffix)

    @property
    def content_hash(self) -> str:
        """sha256 (hex) of what the pair holds: equal for equal tokens and borders (and loss mask), whatever the files
        are called."""
        mask = "" if self.chat is None else self.chat["mask"]["sha256"]
        return hashlib.sha256(f"{self.file('.bin')['sha256']}{self.file('.idx')['sha256']}{mask}".encode()).hexdigest()


def read_manifest(prefix: str | Path) -> Manifest | None:
    """Manifest of a pair, or None when it has none (files written by Megatron). Raises UserError if it is broken."""
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    return parse_manifest(path.read_bytes(), path)


def parse_manifest(content: bytes, path: str | Path) -> Manifest:
    """Manifest from the bytes of its file; ``path`` is for the message. Raises UserError if it is broken."""
    try:
        manifest = Manifest(**json.loads(content))
        manifest.file(".bin")["sha256"], manifest.file(".idx")["sha256"]
        if manifest.chat is not None:
            manifest.chat["kind"], manifest.chat["mask"]["sha256"]
    except (ValueError, TypeError, KeyError, AttributeError, StopIteration) as error:
        raise UserError(f"{path} is not a manifest of this version ({error}): tokenise the source again") from error
    if manifest.version != MANIFEST_VERSION:
        raise UserError(
            f"{path} has manifest version {manifest.version}, this software reads {MANIFEST_VERSION}: tokenise the "
            "source again"
        )
    return manifest


def spot_hashes(path: Path) -> list[list[Any]]:
    """[byte offset, blake2b-64 (hex)] of blocks of SPOT_BYTES, spread evenly over a file, ends included: NUM_SPOTS of
    them, or as many as cover a smaller file."""
    size = path.stat().st_size
    last = max(0, size - SPOT_BYTES)
    gaps = max(1, min(NUM_SPOTS, -(-size // SPOT_BYTES)) - 1)
    offsets = sorted({last * i // gaps for i in range(gaps + 1)})
    with open(path, "rb", buffering=0) as stream:
        return [[offset, _block_hash(stream, offset)] for offset in offsets]


def check_spots(path: Path, facts: Mapping[str, Any]) -> None:
    """Hold a file to the size and the spot hashes in its manifest: a megabyte of reading, whatever its size.

    So another file of the same size is found when the data are opened. A change between the spots is found by
    `hymba data validate`, which reads everything. Raises UserError naming the file and the first offset that differs.
    """
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise UserError(f"{path} has {size} bytes, its manifest says {facts['bytes']}: copy or tokenise it again")
    with open(path, "rb", buffering=0) as stream:
        for offset, expected in facts["spots"]:
            if _block_hash(stream, offset) != expected:
                raise UserError(
                    f"{path} differs from its manifest in the {SPOT_BYTES} bytes from offset {offset}: it was replaced "
                    "or damaged; copy or tokenise it again"
                )


def _block_hash(stream: IO[bytes], offset: int) -> str:
    return hashlib.blake2b(os.pread(stream.fileno(), SPOT_BYTES, offset), digest_size=8).hexdigest()


def file_sha256(path: str | Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
