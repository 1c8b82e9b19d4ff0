"""Reading shards in chunks, with the place of every bad record."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from data_prep.inputs import PARQUET, InputFile
from hymba_train.data.extras import import_extra
from hymba_train.data.manifest import file_sha256
from hymba_train.errors import UserError

READ_BYTES = 2**17
BUFFER_BYTES = 2**20
"""Of a file being read: lines of many kB are put together of few pieces, in a quarter of the time."""
CHUNK_BYTES = 2**20
"""Text of one unit of work for a process; a longer line is a chunk of its own."""


@dataclass
class Chunk:
    """Consecutive records of one shard: raw lines of JSON, or values of one column of a Parquet file."""

    path: str
    first: int
    """Number of the first line, from 1; of the first row, from 0."""
    records: list[Any]
    is_column: bool
    """True: ``records`` are the texts themselves, as Parquet has them."""
    read_bytes: int
    """Bytes of the file, as stored, read when this chunk was complete."""


@dataclass
class ParsedChunk:
    """Texts of a chunk with their record numbers, and what was wrong with the others ("file:line: reason")."""

    texts: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    bad_lines: list[str] = field(default_factory=list)


@dataclass
class TokenizedChunk:
    """``tokens`` are all documents end to end, in the type of the file; ``lengths`` those of each document. Of
    conversations also the loss ``mask`` of every token, and ``counts`` for the manifest."""

    tokens: np.ndarray
    lengths: np.ndarray
    num_empty: int
    text_bytes: int
    bad_lines: list[str]
    read_bytes: int
    mask: np.ndarray | None = None
    counts: dict[str, int] | None = None


def parse_chunk(chunk: Chunk, json_key: str) -> ParsedChunk:
    """Take ``json_key`` out of every record; blank lines are passed over."""
    parsed = ParsedChunk()
    for number, record in enumerate(chunk.records, chunk.first):
        try:
            if chunk.is_column:
                text = check_text(record, json_key)
            elif (text := quick_text(record, json_key)) is None:
                if not record.strip():
                    continue
                text = parse_line(record.rstrip(b"\r\n"), json_key)
            parsed.texts.append(text)
            parsed.numbers.append(number)
        except ValueError as error:
            row = "row " if chunk.is_column else ""
            parsed.bad_lines.append(f"{chunk.path}:{row}{number}: {error}")
    return parsed


def quick_text(line: bytes, json_key: str) -> str | None:
    """Text of a line without fault, in half the time of :func:`parse_line`; None: that has to look at the line.

    The quick parser is the stricter one (no NaN, no half of a surrogate pair), so what it takes both take.
    """
    try:
        text = orjson.loads(line)[json_key]
    except (ValueError, TypeError, KeyError):
        return None
    return text if isinstance(text, str) else None


def parse_line(line: bytes, json_key: str) -> str:
    """Text of one line. Raises ValueError with the reason: as :func:`parse_object`, key missing, no string."""
    record = parse_object(line)
    if json_key not in record:
        raise ValueError(f"not a JSON object with the key {json_key!r}")
    return check_text(record[json_key], json_key)


def parse_object(line: bytes) -> dict[str, Any]:
    """JSON object of one line. Raises ValueError with the reason: no UTF-8, no JSON, no object."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON at column {error.colno} ({error.msg})") from error
    except RecursionError as error:
        raise ValueError("JSON is nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


def check_text(text: Any, json_key: str) -> str:
    """``text`` if it is a string of whole characters. Raises ValueError with the reason."""
    if isinstance(text, bytes):
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"invalid UTF-8 at byte {error.start} of the value of {json_key!r}") from error
    if not isinstance(text, str):
        raise ValueError(f"the value of {json_key!r} is not a string but {type(text).__name__}")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"character {error.start} of the text is half of a surrogate pair") from error
    return text


class ShardReader:
    """Chunks of one shard, in order.

    Args:
        chunk_bytes: bytes of text in a chunk; None: CHUNK_BYTES.

    Attributes:
        num_records: lines or rows read so far.
        num_bytes, sha256: of the file as stored, once all chunks have been taken.

    Raises UserError (while reading): a damaged file, a Parquet file without the column, a missing package.
    """

    def __init__(self, file: InputFile, json_key: str, chunk_bytes: int | None = None) -> None:
        self.file, self.json_key = file, json_key
        self.chunk_bytes = chunk_bytes or CHUNK_BYTES
        self.num_records = 0

    def __iter__(self) -> Iterator[Chunk]:
        return self._rows() if self.file.format == PARQUET else self._lines()

    def _lines(self) -> Iterator[Chunk]:
        path = self.file.path
        hashed = HashedFile(path)
        with io.BufferedReader(hashed, BUFFER_BYTES) as raw, open_lines(self.file, raw) as stream:
            while lines := self._readlines(stream):
                yield Chunk(str(path), self.num_records + 1, lines, False, raw.tell())
                self.num_records += len(lines)
        self.num_bytes, self.sha256 = hashed.num_bytes, hashed.sha256

    def _readlines(self, stream: Any) -> list[bytes]:
        try:
            return stream.readlines(self.chunk_bytes)
        except Exception as error:  # each compression has errors of its own
            if isinstance(error, (OSError, EOFError, zlib.error)) or type(error).__name__ == "ZstdError":
                raise UserError(f"{self.file.path}: cannot be read after line {self.num_records}: {error}") from error
            raise

    def _rows(self) -> Iterator[Chunk]:
        parquet = import_extra("pyarrow.parquet", f"reading {self.file.path}")
        path = self.file.path
        self.num_bytes, self.sha256 = self.file.num_bytes, file_sha256(path)  # it is not read from end to end
        try:
            with parquet.ParquetFile(path) as table:
                if self.json_key not in table.schema_arrow.names:
                    names = ", ".join(table.schema_arrow.names)
                    raise UserError(f"{path} has no column {self.json_key!r}; it has {names}: set --json-keys")
                rows_each = self._rows_each(table.metadata)
                for batch in table.iter_batches(rows_each, columns=[self.json_key], use_threads=False):
                    share = (self.num_records + batch.num_rows) / max(1, table.metadata.num_rows)
                    values = self._values(batch.column(0))
                    yield Chunk(str(path), self.num_records, values, True, int(share * self.file.num_bytes))
                    self.num_records += len(values)
        except OSError as error:  # pyarrow's ArrowException is a ValueError or OSError
            raise self._damaged(error) from error
        except ValueError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:200]
        return UserError(f"{self.file.path}: cannot be read after row {self.num_records}: {reason}")

    def _rows_each(self, metadata: Any) -> int:
        """Rows that make about one chunk of text."""
        column = metadata.schema.to_arrow_schema().get_field_index(self.json_key)
        columns = [metadata.row_group(i).column(column) for i in range(metadata.num_row_groups)] if column >= 0 else []
        size = sum(column.total_uncompressed_size for column in columns)
        return max(1, int(metadata.num_rows * CHUNK_BYTES / max(1, size)))

    @staticmethod
    def _values(column: Any) -> list[Any]:
        try:
            return column.to_pylist()
        except UnicodeDecodeError:  # Arrow believes that a string column is UTF-8: look at each value
            return column.cast("binary").to_pylist()


class HashedFile(io.RawIOBase):
    """A file read from beginning to end, with the sha256 (hex) and the number of the bytes read so far.

    The hash in a manifest is then that of the bytes that were tokenised, and a shard on slow storage is read once.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  closed in close()
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._hash.update(memoryview(buffer)[:count])
        self.num_bytes += count
        return count

    def tell(self) -> int:
        return self.num_bytes

    def close(self) -> None:
        self._file.close()
        super().close()


def open_lines(file: InputFile, raw: Any) -> Any:
    """Stream of the uncompressed bytes of a JSON-lines shard."""
    if file.compression == "gzip":
        return gzip.GzipFile(fileobj=raw)
    if file.compression == "zstd":
        zstandard = import_extra("zstandard", f"reading {file.path}")
        # A shard compressed with `zstd --long=31` needs that window.
        return io.BufferedReader(_ZstdStream(zstandard.ZstdDecompressor(max_window_size=2**31), raw), CHUNK_BYTES)
    return raw


class _ZstdStream(io.RawIOBase):
    """Bytes of one or several zstd frames. The library's own stream takes a file that is cut short for its end."""

    def __init__(self, decompressor: Any, raw: Any) -> None:
        self._decompressor, self._raw = decompressor, raw
        self._frame: Any = None
        self._compressed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and self._step():
            pass
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _step(self) -> bool:
        """Decompress some more; False at the end. Raises EOFError inside a frame."""
        self._compressed = self._compressed or self._raw.read(READ_BYTES)
        if not self._compressed:
            if self._frame is not None:
                raise EOFError("the file ends inside a zstd frame")
            return False
        if self._frame is None:
            self._frame = self._decompressor.decompressobj()
        self._ready = memoryview(self._frame.decompress(self._compressed))
        self._compressed = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None
        return True
