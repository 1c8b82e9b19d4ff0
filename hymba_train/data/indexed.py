"""Megatron's indexed dataset: PREFIX.bin holds the tokens, PREFIX.idx says where documents lie.

.idx, little-endian (megatron/core/datasets/indexed_dataset.py): magic ``MMIDIDX\\0\\0``, u64 version 1, u8 dtype code,
u64 number of sequences, u64 length of the document index, int32 sequence lengths in tokens, int64 byte offsets of the
sequences in .bin, int64 document index: the first sequence of each document, and the number of sequences at the end.

Our own reader, because Megatron-Core's imports torch (seconds) and believes what the files say. Files of either side
are read by the other; a test holds them byte-equal. :mod:`hymba_train.data.indexed_writer` writes them.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left, bisect_right
from pathlib import Path

import numpy as np

from hymba_train.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
UINT16_VOCAB_LIMIT = 65500
"""Megatron's rule: a vocabulary below this is stored as uint16, any other as int32."""
BLOCK_ITEMS = 2**20
"""Entries of the index that are handled at a time."""


def token_dtype(vocab_size: int) -> np.dtype:
    """Type in which a vocabulary's tokens are stored."""
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCAB_LIMIT else np.int32)


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


class IndexedTokens:
    """Read access to a .bin/.idx pair as one run of tokens with document borders.

    Opening checks sizes only, in constant time. The index is memory-mapped; tokens are read with pread, which leaves
    other threads running while the storage answers, holds no memory, and turns a file that shrinks under a running
    job into an error instead of a SIGBUS. :meth:`verify` reads all of the index.

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
        self._bin = open(bin_path(prefix), "rb", buffering=0)  # noqa: SIM115  open as long as this object lives
        actual_bytes = os.fstat(self._bin.fileno()).st_size
        expected_bytes = self.num_tokens * self.dtype.itemsize
        if actual_bytes != expected_bytes:
            raise UserError(
                f"{bin_path(prefix)} has {actual_bytes} bytes, but {idx_path(prefix)} describes {expected_bytes} "
                f"({self.num_tokens} tokens of {self.dtype}): copy or tokenise it again"
            )

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
        """Number of the document that holds the token at offset ``token``. O(log documents). Raises IndexError."""
        if not 0 <= token < self.num_tokens:
            raise IndexError(f"token offset {token} is outside the {self.num_tokens} tokens of {self.prefix}")
        # bisect, not np.searchsorted: that copies a whole index whose header leaves it unaligned.
        sequence = bisect_right(self._pointers, token * self.dtype.itemsize) - 1
        return bisect_right(self._documents, sequence) - 1

    def document_starts(self, begin: int, end: int) -> np.ndarray:
        """Offsets in tokens, int64, of all documents that start in begin..end-1; empty documents are left out."""
        first = bisect_left(self._pointers, begin * self.dtype.itemsize)
        last = bisect_left(self._pointers, end * self.dtype.itemsize, lo=first)
        if first == last:
            return np.empty(0, dtype=np.int64)
        low = bisect_left(self._documents, first)
        high = bisect_left(self._documents, last, lo=low)
        starts = self._pointers[self._documents[low:high]] // self.dtype.itemsize
        if starts.size > 1:  # an empty document starts where the one behind it does
            starts = starts[np.concatenate([[True], starts[1:] != starts[:-1]])]
        return starts

    def document_offsets(self, begin_document: int, end_document: int) -> np.ndarray:
        """Offsets in tokens, int64 [end_document - begin_document + 1], of the first token of each document and of
        the end of the last one."""
        sequences = self._documents[begin_document : end_document + 1]
        inside = sequences < self.num_sequences
        offsets = np.full(sequences.size, self.num_tokens, dtype=np.int64)
        offsets[inside] = self._pointers[sequences[inside]] // self.dtype.itemsize
        return offsets

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Tokens begin..end-1 as int64 [end - begin], a copy.

        Raises IndexError outside the file, UserError when the file has become shorter since it was opened.
        """
        return self.stored_tokens(begin, end).astype(np.int64)

    def stored_tokens(self, begin: int, end: int) -> np.ndarray:
        """As :meth:`tokens`, in the type of the file, read-only. Raises IndexError."""
        if not 0 <= begin <= end <= self.num_tokens:
            raise IndexError(f"tokens {begin}..{end} are outside the {self.num_tokens} of {self.prefix}")
        return np.frombuffer(self._read(begin, end), self.dtype)

    def _read(self, begin: int, end: int) -> bytes:
        offset, size = begin * self.dtype.itemsize, (end - begin) * self.dtype.itemsize
        data = os.pread(self._bin.fileno(), size, offset)
        while len(data) < size:  # pread may give less than asked for, at most 2 GiB at a time
            more = os.pread(self._bin.fileno(), size - len(data), offset + len(data))
            if not more:
                raise UserError(
                    f"{self.prefix}.bin ends at byte {offset + len(data)}, {size - len(data)} bytes before the end of "
                    f"what its index describes there: it was cut short after it was opened; copy it again"
                )
            data += more
        return data

    def document(self, document: int) -> np.ndarray:
        """All tokens of one document, int64. Raises IndexError."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} is outside the {self.num_documents} of {self.prefix}")
        return self.tokens(self.document_start(document), self.document_start(document + 1))

    def verify(self) -> None:
        """Read all of .idx and check that sequences lie end to end and document borders never step back.

        Raises UserError naming the file, the first bad sequence or border, and its byte offset.
        """
        path, size = idx_path(self.prefix), self.dtype.itemsize
        pointers_begin = HEADER.size + 4 * self.num_sequences
        expected = 0
        for begin in range(0, self.num_sequences, BLOCK_ITEMS):
            lengths = self._lengths[begin : begin + BLOCK_ITEMS].astype(np.int64)
            ends = expected + np.cumsum(lengths) * size
            bad = np.flatnonzero((self._pointers[begin : begin + BLOCK_ITEMS] != ends - lengths * size) | (lengths < 0))
            if bad.size:
                raise UserError(
                    f"{path}: sequence {begin + bad[0]} does not start where the one before it ends (byte "
                    f"{pointers_begin + 8 * (begin + bad[0])}): copy or tokenise it again"
                )
            expected = int(ends[-1])
        documents_begin = pointers_begin + 8 * self.num_sequences
        for begin in range(0, self.num_documents, BLOCK_ITEMS):
            bad = np.flatnonzero(np.diff(self._documents[begin : begin + BLOCK_ITEMS + 1]) < 0)
            if bad.size:
                raise UserError(
                    f"{path}: document border {begin + bad[0] + 1} lies before the one in front of it (byte "
                    f"{documents_begin + 8 * (begin + bad[0] + 1)}): copy or tokenise it again"
                )


def _map(path: Path, dtype: type, offset: int, count: int) -> np.ndarray:
    # As a plain array: np.memmap's own indexing is several times slower.
    return np.asarray(np.memmap(path, dtype, "r", offset, (count,))) if count else np.empty(0, dtype)
