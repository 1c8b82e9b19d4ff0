"""The index of a packing on disk, and samples read through it.

A packing decides once, offline (`hymba data pack`), which pieces of a source's training documents share a sequence of
one length. A job maps the file and never makes it: building on thousands of ranks is how jobs run into timeouts.

PREFIX.<packing>-<S>.pack (PhaseConfig.pack_suffix): magic; int64 offset of the first token of each piece in .bin;
int64 first piece of each sequence, and the number of pieces; int32 tokens of each piece; JSON trailer with the facts;
its length (u64); magic.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from hymba_train.data.indexed import BLOCK_ITEMS, idx_path
from hymba_train.data.manifest import file_sha256, spot_hashes
from hymba_train.data.packing import assign, cut_documents, pack_lengths
from hymba_train.data.user_files import replacing_or_refused
from hymba_train.data.windows import TokenRange
from hymba_train.errors import UserError

MAGIC = b"HYPACK\x00\x01"
_TAIL = struct.Struct("<Q8s")
_AGAIN = "build it again with `hymba data pack --overwrite`"
_Ordered = tuple[np.ndarray, np.ndarray | None]  # values, and the order in which they are written


class Packs:
    """Samples of a packed source; the interface is :class:`hymba_train.data.windows.Sequences`.

    Args:
        part: the training part for which the index was built.
        path: the .pack file.
        packing, seq_length, min_document_tokens: what the phase asks for.
        pad_id: token that fills up a sequence (never a label; a document of its own under a document mask).
        documents_per_piece: so many neighbouring documents are packed as one.

    Raises UserError: no such file, a damaged one, or one that was built for other data.
    """

    def __init__(
        self, part: TokenRange, path: str | Path, packing: str, seq_length: int, min_document_tokens: int, pad_id: int,
        documents_per_piece: int = 1,
    ) -> None:  # fmt: skip
        self.part, self.seq_length, self.pad_id = part, seq_length, pad_id
        self.documents_per_piece = documents_per_piece
        path = Path(path)
        self.facts = _read_trailer(path)
        expected = _facts_of(part, packing, seq_length, min_document_tokens, documents_per_piece)
        for key, value in expected.items():
            if self.facts.get(key) != value:
                raise UserError(
                    f"{path} was built for {key} {self.facts.get(key)}, now it is {value} (other files, or another "
                    f"validation_fraction): {_AGAIN}"
                )
        num_pieces, num_sequences = self.facts["num_pieces"], self.facts["num_sequences"]
        sizes = (8 * num_pieces, 8 * (num_sequences + 1), 4 * num_pieces)
        if self.facts["payload_bytes"] != sum(sizes):
            raise UserError(f"{path}: its trailer contradicts itself; {_AGAIN}")
        at = len(MAGIC)
        self._starts = _map(path, np.int64, at, num_pieces)
        self._first = _map(path, np.int64, at + sizes[0], num_sequences + 1)
        self._lengths = _map(path, np.int32, at + sizes[0] + sizes[1], num_pieces)

    def __len__(self) -> int:
        return self.facts["num_sequences"]

    def pieces(self, sequence: int) -> tuple[np.ndarray, np.ndarray]:
        """(offset in .bin of the first token, tokens) of each piece of a sequence, in their order there.

        Raises IndexError.
        """
        if not 0 <= sequence < len(self):
            raise IndexError(f"sequence {sequence} is outside the {len(self)} of {self.part.tokens.prefix}")
        begin, end = self._first[sequence : sequence + 2].tolist()
        return self._starts[begin:end], self._lengths[begin:end]

    def read(self, window: int) -> np.ndarray:
        """Tokens of a sequence, int64 [S + 1], filled up with ``pad_id``."""
        tokens = np.full(self.seq_length + 1, self.pad_id, dtype=np.int64)
        place = 0
        for start, length in zip(*(array.tolist() for array in self.pieces(window)), strict=True):
            tokens[place : place + length] = self.part.tokens.tokens(start, start + length)
            place += length
        return tokens

    def borders(self, window: int) -> np.ndarray:
        """Places 1..S at which another document (or piece of one), or the padding, starts, int64, ascending."""
        starts, lengths = self.pieces(window)
        borders = ends = np.cumsum(lengths, dtype=np.int64)
        if self.documents_per_piece > 1:
            inside = [
                self.part.tokens.document_starts(start + 1, start + length) - start + end - length
                for start, length, end in zip(starts.tolist(), lengths.tolist(), ends.tolist(), strict=True)
            ]
            borders = np.sort(np.concatenate([ends, *inside]))
        return borders[borders <= self.seq_length]

    def first_documents(self, window: int) -> list[int]:
        """Number in the file of the first document of each piece."""
        return [self.part.tokens.document_at(start) for start in self.pieces(window)[0].tolist()]

    def num_tokens(self, window: int) -> int:
        """Tokens of a sequence that are no padding."""
        return int(self.pieces(window)[1].sum())

    def offset(self, window: int, place: int = 0) -> int:
        """Offset in the file, in tokens, of the token at ``place`` of a sequence. IndexError in the padding."""
        starts, lengths = self.pieces(window)
        ends = np.cumsum(lengths)
        piece = int(np.searchsorted(ends, place, side="right"))
        return int(starts[piece]) + place - int(ends[piece] - lengths[piece])


def build_packs(
    part: TokenRange, path: str | Path, packing: str, seq_length: int, min_document_tokens: int = 0,
    documents_per_piece: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Work out a packing and write its index, complete or not at all. Returns the facts in its trailer.

    Needs about 60 bytes of memory a document.

    Raises UserError when no document is long enough.
    """
    offsets = part.tokens.document_offsets(part.begin_document, part.end_document)[::documents_per_piece]
    starts, lengths = cut_documents(offsets, seq_length, min_document_tokens)
    if not lengths.size:
        raise UserError(
            f"{part.tokens.prefix}: none of its {part.num_documents} documents has {max(2, min_document_tokens)} tokens"
        )
    num_left_out = int((np.diff(offsets) < max(2, min_document_tokens)).sum())
    capacity = seq_length + 1
    groups = pack_lengths(np.bincount(lengths, minlength=capacity + 1), capacity, packing)
    order, first = assign(lengths, groups)
    facts = {
        **_facts_of(part, packing, seq_length, min_document_tokens, documents_per_piece),
        "idx_sha256": file_sha256(idx_path(part.tokens.prefix)),
        "num_sequences": first.size - 1,
        "num_pieces": lengths.size,
        "num_documents_left_out": num_left_out,
        "num_documents_cut": int((np.diff(offsets) > capacity).sum()),
        "num_padding_tokens": int((first.size - 1) * capacity - lengths.sum(dtype=np.int64)),
    }
    _write(Path(path), (starts, order), first, (lengths, order), facts)
    return facts


def _facts_of(
    part: TokenRange, packing: str, seq_length: int, min_document_tokens: int, documents_per_piece: int
) -> dict[str, Any]:
    together = {} if documents_per_piece == 1 else {"documents_per_piece": documents_per_piece}
    return together | {
        "packing": packing,
        "seq_length": seq_length,
        "min_document_tokens": min_document_tokens,
        "num_source_tokens": part.tokens.num_tokens,
        "begin_document": part.begin_document,
        "end_document": part.end_document,
        "idx_spots": hashlib.sha256(repr(spot_hashes(idx_path(part.tokens.prefix))).encode()).hexdigest()[:16],
    }


def _write(path: Path, starts: _Ordered, first: np.ndarray, lengths: _Ordered, facts: dict[str, Any]) -> None:
    """A bounded piece at a time."""
    parts: tuple[_Ordered, ...] = (starts, (first, None), lengths)
    digest, num_bytes = hashlib.sha256(), 0
    with replacing_or_refused(path) as temporary, open(temporary, "wb") as stream:
        stream.write(MAGIC)
        for values, order in parts:
            for begin in range(0, values.size, BLOCK_ITEMS):
                chosen = slice(begin, begin + BLOCK_ITEMS) if order is None else order[begin : begin + BLOCK_ITEMS]
                data = np.ascontiguousarray(values[chosen]).data
                stream.write(data)
                digest.update(data)
                num_bytes += data.nbytes
        facts |= {"payload_bytes": num_bytes, "payload_sha256": digest.hexdigest()}
        trailer = json.dumps(facts, sort_keys=True).encode()
        stream.write(trailer + _TAIL.pack(len(trailer), MAGIC))


def _read_trailer(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            head = stream.read(len(MAGIC))
            stream.seek(max(0, size - _TAIL.size))
            length, tail = _TAIL.unpack(stream.read(_TAIL.size))
            stream.seek(max(0, size - _TAIL.size - length))
            facts = json.loads(stream.read(length)) if head == tail == MAGIC else {}
        whole = size == len(MAGIC) + facts["payload_bytes"] + length + _TAIL.size
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist: build it once, offline, with `hymba data pack` and the overrides of this run "
            "(a job never builds it)"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise UserError(f"{path} is not a whole .pack file: {_AGAIN}") from error
    if not whole:
        raise UserError(f"{path} is not a whole .pack file: {_AGAIN}")
    return facts


def verify_packs(path: str | Path) -> dict[str, Any]:
    """Read all of an index and compare it with the hash in its trailer. Returns the facts. Raises UserError."""
    facts = _read_trailer(Path(path))
    digest, left = hashlib.sha256(), facts["payload_bytes"]
    with open(path, "rb") as stream:
        stream.seek(len(MAGIC))
        while left and (data := stream.read(min(left, 2**22))):
            digest.update(data)
            left -= len(data)
    if digest.hexdigest() != facts["payload_sha256"]:
        raise UserError(f"{path} has another sha256 than its trailer says: {_AGAIN}")
    return facts


def _map(path: Path, dtype: type, offset: int, count: int) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype, "r", offset, (count,))) if count else np.empty(0, dtype)
