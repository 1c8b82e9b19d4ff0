"""Megatron's indexed dataset: PREFIX.bin holds the tokens, PREFIX.idx says where documents lie.

.idx, little-endian (megatron/core/datasets/indexed_dataset.py): magic ``MMIDIDX\\0\\0``, u64 version 1, u8 dtype code,
u64 number of sequences, u64 length of the document index, int32 sequence lengths in tokens, int64 byte offsets of the
sequences in .bin, int64 document index: the first sequence of each document, and the number of sequences at the end.

Our own reader, because Megatron-Core's imports torch (seconds) and believes what the files say. Files of either side
are read by the other; a test holds them byte-equal.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import secrets
import struct
from pathlib import Path

import numpy as np

from hymba_train.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
UINT16_VOCAB_LIMIT = 65500
"""Megatron's rule: a vocabulary below this is stored as uint16, any other as int32."""


def token_dtype(vocab_size: int) -> np.dtype:
    """Type in which a vocabulary's tokens are stored."""
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCAB_LIMIT else np.int32)


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


class IndexedTokens:
    """Read access to a .bin/.idx pair as one run of tokens with document borders.

    Opening checks sizes only, in constant time; memory is what the touched pages take. :meth:`verify` reads all of
    the index.

    Args:
        prefix: path without .bin / .idx.

    Raises UserError: file missing, not an index, or a size that differs from what the index says.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        for path in (bin_path(prefix), idx_path(prefix)):
            if not path.is_file():
                raise UserError(f"{path} does not exist; `hymba data tokenize` writes it")
        self._read_header(idx_path(prefix))
        actual_bytes = bin_path(prefix).stat().st_size
        expected_bytes = self.num_tokens * self.dtype.itemsize
        if actual_bytes != expected_bytes:
            raise UserError(
                f"{bin_path(prefix)} has {actual_bytes} bytes, but {idx_path(prefix)} describes {expected_bytes} "
                f"({self.num_tokens} tokens of {self.dtype}): copy or tokenise it again"
            )
        # An empty file cannot be mapped.
        self._tokens = np.memmap(bin_path(prefix), self.dtype, "r") if expected_bytes else np.empty(0, self.dtype)

    def _read_header(self, path: Path) -> None:
        actual_bytes = path.stat().st_size
        with open(path, "rb") as stream:
            header = stream.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise UserError(f"{path} is not a Megatron index: it does not start with {MAGIC!r} and a full header")
        _, version, code, num_sequences, num_index = HEADER.unpack(header)
        if version != 1 or code not in DTYPE_CODES:
            raise UserError(f"{path}: version {version}, dtype code {code}; known are version 1, codes 1-5 and 8")
        # Megatron adds one byte a sequence for multimodal data; we read such files, and leave the modes alone.
        expected_bytes = HEADER.size + 12 * num_sequences + 8 * num_index
        if actual_bytes not in (expected_bytes, expected_bytes + num_sequences) or num_index < 1:
            raise UserError(
                f"{path} has {actual_bytes} bytes, but its header describes {expected_bytes} ({num_sequences} "
                f"sequences, {num_index} document borders): copy or tokenise it again"
            )
        self.dtype = np.dtype(DTYPE_CODES[code])
        self.num_sequences = num_sequences
        self.num_documents = num_index - 1
        pointers = HEADER.size + 4 * num_sequences
        self._lengths = _map(path, np.int32, HEADER.size, num_sequences)
        self._pointers = _map(path, np.int64, pointers, num_sequences)
        self._documents = _map(path, np.int64, pointers + 8 * num_sequences, num_index)
        end_bytes = int(self._pointers[-1]) + int(self._lengths[-1]) * self.dtype.itemsize if num_sequences else 0
        self.num_tokens = end_bytes // self.dtype.itemsize
        if self._documents[-1] != num_sequences or self._documents[0] != 0 or end_bytes % self.dtype.itemsize:
            raise UserError(f"{path}: document borders do not cover its {num_sequences} sequences; tokenise it again")

    def document_start(self, document: int) -> int:
        """Offset in tokens of the first token of ``document``, 0..num_documents (the last gives num_tokens)."""
        sequence = int(self._documents[document])
        if sequence == self.num_sequences:
            return self.num_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def document_at(self, token: int) -> int:
        """Number of the document that holds the token at offset ``token``. O(log documents)."""
        if not 0 <= token < self.num_tokens:
            raise IndexError(f"token offset {token} is outside the {self.num_tokens} tokens of {self.prefix}")
        return bisect.bisect_right(range(self.num_documents), token, key=self.document_start) - 1

    def document_starts(self, begin: int, end: int) -> np.ndarray:
        """Offsets in tokens, int64, of all documents that start in begin..end-1; empty documents are left out."""
        starts: list[int] = []
        first = bisect.bisect_left(range(self.num_documents), begin, key=self.document_start)
        for document in range(first, self.num_documents):
            start = self.document_start(document)
            if start >= end:
                break
            if not starts or starts[-1] != start:
                starts.append(start)
        return np.array(starts, dtype=np.int64)

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Tokens begin..end-1 as int64 [end - begin], a copy. Raises IndexError outside the file."""
        if not 0 <= begin <= end <= self.num_tokens:
            raise IndexError(f"tokens {begin}..{end} are outside the {self.num_tokens} of {self.prefix}")
        return self._tokens[begin:end].astype(np.int64)

    def document(self, document: int) -> np.ndarray:
        """All tokens of one document, int64."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} is outside the {self.num_documents} of {self.prefix}")
        return self.tokens(self.document_start(document), self.document_start(document + 1))

    def verify(self) -> None:
        """Read all of .idx and check that sequences lie end to end and document borders never step back.

        Raises UserError naming the file and the first bad sequence or border.
        """
        path, size = idx_path(self.prefix), self.dtype.itemsize
        expected = 0
        for begin in range(0, self.num_sequences, 2**20):
            lengths = self._lengths[begin : begin + 2**20].astype(np.int64)
            ends = expected + np.cumsum(lengths) * size
            bad = np.flatnonzero((self._pointers[begin : begin + 2**20] != ends - lengths * size) | (lengths < 0))
            if bad.size:
                raise UserError(f"{path}: sequence {begin + bad[0]} does not start where the one before it ends")
            expected = int(ends[-1])
        for begin in range(0, self.num_documents, 2**20):
            bad = np.flatnonzero(np.diff(self._documents[begin : begin + 2**20 + 1]) < 0)
            if bad.size:
                raise UserError(f"{path}: document border {begin + bad[0] + 1} lies before the one in front of it")


def _map(path: Path, dtype: type, offset: int, count: int) -> np.ndarray:
    return np.memmap(path, dtype, "r", offset, (count,)) if count else np.empty(0, dtype)


class IndexedWriter:
    """Write a .bin/.idx pair, one document after another.

    Both files are written under temporary names (``<name>.tmp-<random>``) and take their own in :meth:`publish`, after
    fsync: a pair that is there is whole. Used as a context manager, an error removes what was written.

    Args:
        prefix: path without .bin / .idx; its directory exists.
        dtype: numpy integer type of the tokens, see :func:`token_dtype`.
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
        data = np.ascontiguousarray(tokens, dtype=self.dtype).tobytes()
        self._bin.write(data)
        self._hash.update(data)
        self._lengths.append(lengths.astype(np.int32))
        self.num_tokens += tokens.size
        self.num_documents += lengths.size

    def publish(self) -> dict[str, dict[str, int | str]]:
        """Finish both files, fsync and rename them. Returns {file name: {"bytes": ..., "sha256": ...}}."""
        lengths = np.concatenate(self._lengths or [np.empty(0, np.int32)])
        pointers = np.zeros(lengths.size, dtype=np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * self.dtype.itemsize, out=pointers[1:])
        header = HEADER.pack(MAGIC, 1, self._code, lengths.size, lengths.size + 1)
        documents = np.arange(lengths.size + 1, dtype=np.int64)
        index = header + lengths.tobytes() + pointers.tobytes() + documents.tobytes()
        _sync_and_close(self._bin)
        with open(self._temporary[1], "wb") as stream:
            stream.write(index)
            _sync_and_close(stream)
        for temporary, path in zip(self._temporary, self._paths, strict=True):
            os.replace(temporary, path)
        sync_directory(self._paths[0].parent)
        bin_bytes = self.num_tokens * self.dtype.itemsize
        return {
            self._paths[0].name: {"bytes": bin_bytes, "sha256": self._hash.hexdigest()},
            self._paths[1].name: {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()},
        }

    def discard(self) -> None:
        """Remove what was written and not published."""
        self._bin.close()
        for path in self._temporary:
            path.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Name beside ``path`` under which it is written; random, so that two writers do not meet."""
    return path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")


def _sync_and_close(stream) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


def sync_directory(path: Path) -> None:
    """fsync a directory, so that a rename inside it survives a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
