"""Writing .bin/.idx pairs: whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hymba_train.data.indexed import BLOCK_ITEMS, DTYPE_CODES, HEADER, MAGIC, bin_path, idx_path
from hymba_train.data.manifest import spot_hashes
from hymba_train.errors import UserError
from hymba_train.files import fsync, sync_and_close, temporary_path


class IndexedWriter:
    """Write a .bin/.idx pair, one document after another.

    Both files are written under temporary names (``<name>.tmp-<random>``) and take their own in :meth:`publish`, after
    fsync: a pair that is there is whole. Used as a context manager, an error removes what was written. Four bytes of
    memory a document, whatever their length.

    Args:
        prefix: path without .bin / .idx; its directory exists.
        dtype: numpy integer type of the tokens, see :func:`hymba_train.data.indexed.token_dtype`.

    Raises UserError, naming file and offset, when the storage is full.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        self._code = next(code for code, known in DTYPE_CODES.items() if self.dtype == known)
        self._paths = (bin_path(prefix), idx_path(prefix))
        self._temporary = tuple(temporary_path(path) for path in self._paths)
        self._bin = open(self._temporary[0], "wb")  # noqa: SIM115  closed in publish() or discard()
        self._lengths: list[np.ndarray] = []
        self._hash = hashlib.sha256()
        self._published = False
        self.num_tokens = 0
        self.num_documents = 0

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents that lie end to end in ``tokens``; ``lengths`` [documents] are in tokens."""
        if int(lengths.sum()) != tokens.size:
            raise ValueError(f"lengths sum to {int(lengths.sum())}, not to {tokens.size} tokens")
        data = np.ascontiguousarray(tokens, dtype=self.dtype).data
        try:
            self._bin.write(data)
        except OSError as error:
            raise _cannot_write(self._paths[0], self.num_tokens * self.dtype.itemsize, error) from error
        self._hash.update(data)
        self._lengths.append(lengths.astype(np.int32))
        self.num_tokens += tokens.size
        self.num_documents += lengths.size

    def publish(self) -> dict[str, dict[str, Any]]:
        """Finish both files, fsync and rename them. Returns the manifest's ``files``."""
        bin_bytes = self.num_tokens * self.dtype.itemsize
        try:
            sync_and_close(self._bin)
        except OSError as error:
            raise _cannot_write(self._paths[0], bin_bytes, error) from error
        index_hash, index_bytes = hashlib.sha256(), 0
        try:
            with open(self._temporary[1], "wb") as stream:
                for block in self._index():
                    stream.write(block)
                    index_hash.update(block)
                    index_bytes += len(block)
                sync_and_close(stream)
        except OSError as error:
            raise _cannot_write(self._paths[1], index_bytes, error) from error
        for temporary, path in zip(self._temporary, self._paths, strict=True):
            os.replace(temporary, path)
        self._published = True
        fsync(self._paths[0].parent)
        hashes = (self._hash, index_hash)
        return {
            path.name: {"bytes": size, "sha256": made.hexdigest(), "spots": spot_hashes(path)}
            for path, size, made in zip(self._paths, (bin_bytes, index_bytes), hashes, strict=True)
        }

    def _index(self) -> Iterator[bytes]:
        """Content of .idx, a bounded piece at a time."""
        lengths = np.concatenate(self._lengths or [np.empty(0, np.int32)])
        self._lengths = [lengths]
        yield HEADER.pack(MAGIC, 1, self._code, lengths.size, lengths.size + 1)
        for begin in range(0, lengths.size, BLOCK_ITEMS):
            yield lengths[begin : begin + BLOCK_ITEMS].tobytes()
        before = 0
        for begin in range(0, lengths.size, BLOCK_ITEMS):
            ends = before + np.cumsum(lengths[begin : begin + BLOCK_ITEMS], dtype=np.int64) * self.dtype.itemsize
            yield np.concatenate([[before], ends[:-1]]).astype(np.int64).tobytes()
            before = int(ends[-1])
        for begin in range(0, lengths.size + 1, BLOCK_ITEMS):
            yield np.arange(begin, min(begin + BLOCK_ITEMS, lengths.size + 1), dtype=np.int64).tobytes()

    def discard(self) -> None:
        """Remove what was written and not published."""
        if self._published:
            return
        with contextlib.suppress(OSError):  # a full disk says so once more when the rest of the buffer is flushed
            self._bin.close()
        for path in self._temporary:
            path.unlink(missing_ok=True)


def _cannot_write(path: Path, offset: int, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be written after byte {offset} ({error.strerror}); nothing of it was kept: make room, or "
        "choose another output"
    )
