"""Reading JSON lines in chunks, with the place of every bad line."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hymba_train.errors import UserError

CHUNK_BYTES = 2**20
"""Text of one unit of work for a process; a longer line is a chunk of its own."""


@dataclass
class Chunk:
    """Consecutive raw lines of one file."""

    path: str
    first_line: int
    """Number of the first line, from 1."""
    lines: list[bytes]
    read_bytes: int
    """Bytes of the file, as stored, read when this chunk was complete."""


@dataclass
class ParsedChunk:
    """Texts of a chunk, and what was wrong with the other lines ("file:line: reason")."""

    texts: list[str] = field(default_factory=list)
    bad_lines: list[str] = field(default_factory=list)


def parse_chunk(chunk: Chunk, json_key: str) -> ParsedChunk:
    """Take ``json_key`` out of every line; blank lines are passed over."""
    parsed = ParsedChunk()
    for number, line in enumerate(chunk.lines, chunk.first_line):
        if not line.strip():
            continue
        try:
            parsed.texts.append(parse_line(line.rstrip(b"\r\n"), json_key))
        except ValueError as error:
            parsed.bad_lines.append(f"{chunk.path}:{number}: {error}")
    return parsed


def parse_line(line: bytes, json_key: str) -> str:
    """Text of one line. Raises ValueError with the reason: no UTF-8, no JSON object, key missing, no string."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON at column {error.colno} ({error.msg})") from error
    except RecursionError as error:
        raise ValueError("JSON is nested too deeply") from error
    if not isinstance(record, dict) or json_key not in record:
        raise ValueError(f"not a JSON object with the key {json_key!r}")
    text = record[json_key]
    if not isinstance(text, str):
        raise ValueError(f"the value of {json_key!r} is not a string but {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} of the text is half of a surrogate pair") from error
    return text


class JsonlReader:
    """Chunks of several .jsonl or .jsonl.gz files, in order; counts and hashes what it reads.

    Args:
        paths: the files.

    Raises UserError: a file is missing, or (while reading) a damaged gzip stream.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.paths = [Path(path) for path in paths]
        missing = [f"{path} does not exist" for path in self.paths if not path.is_file()]
        if missing:
            raise UserError(*missing)
        self.stored_bytes = sum(path.stat().st_size for path in self.paths)
        self.inputs: list[dict[str, Any]] = []

    def __iter__(self) -> Iterator[Chunk]:
        read_before = 0
        for path in self.paths:
            digest, num_lines, num_bytes = hashlib.sha256(), 0, 0
            with open(path, "rb") as raw:
                stream = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
                while lines := self._read_lines(path, stream, num_lines):
                    for line in lines:
                        digest.update(line)
                        num_bytes += len(line)
                    yield Chunk(str(path), num_lines + 1, lines, read_before + raw.tell())
                    num_lines += len(lines)
            read_before += path.stat().st_size
            self.inputs.append(
                {"name": path.name, "lines": num_lines, "text_bytes": num_bytes, "sha256": digest.hexdigest()}
            )

    @staticmethod
    def _read_lines(path: Path, stream: Any, num_lines: int) -> list[bytes]:
        try:
            return stream.readlines(CHUNK_BYTES)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: cannot be read after line {num_lines}: {error}") from error
