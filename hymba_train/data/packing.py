"""Which pieces of which documents share a sequence, when documents are packed instead of cut at fixed places.

``best_fit`` is best-fit decreasing (Ding et al., "Fewer Truncations Improve Language Modeling", arXiv:2404.10830): a
document longer than a sequence is cut into full pieces and a rest; every piece then goes, the longest first, into the
fullest sequence that still has room. ``length_buckets`` does that within buckets of like length, so that the sequences
of a long-context phase hold long documents: see :func:`pack_lengths`.

Pieces of one length are interchangeable, so the packing is worked out on the histogram of lengths: sequences that
hold the same lengths are one :class:`Group`. The cost grows with the sequence length, not with the number of
documents, and there are as many sequences, just as full, as the textbook algorithm makes (a test holds them together).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FILLER_SHARE = 16
"""Under length_buckets, pieces of at most 1/16 of a sequence may fill the holes of any bucket."""


@dataclass
class Group:
    """``count`` sequences that hold the same lengths, [(length, times), ...], and have ``room`` tokens left."""

    count: int
    room: int
    pattern: list[tuple[int, int]]


class BestFit:
    """Best-fit packing of lengths into sequences of ``capacity`` tokens.

    Feed lengths from the longest to the shortest for best-fit *decreasing*.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._by_room: dict[int, list[Group]] = {}
        self._rooms = 0  # bit r is set when there is a group with room r: its lowest set bit is found in no time
        self._closed: list[Group] = []

    def place(self, length: int, count: int) -> None:
        """Put ``count`` pieces of ``length`` tokens where they fit best."""
        while count:
            fitting = self._rooms >> length
            if not fitting:
                count = self._open(length, count)
                continue
            room = length + (fitting & -fitting).bit_length() - 1
            count = self._fill(room, length, count)

    def close(self) -> None:
        """Let nothing more into the sequences opened so far, until :meth:`reopen`."""
        self._closed += self._take_open()

    def reopen(self) -> None:
        """Undo every :meth:`close`."""
        closed, self._closed = self._closed, []
        for group in closed:
            self._add(group)

    def groups(self) -> list[Group]:
        """All sequences, those with the longest pieces first."""
        everything = [*self._closed, *(group for groups in self._by_room.values() for group in groups)]
        return sorted(everything, key=lambda group: [(-length, -times) for length, times in group.pattern])

    def _add(self, group: Group) -> None:
        self._by_room.setdefault(group.room, []).append(group)
        self._rooms |= 1 << group.room

    def _take_open(self) -> list[Group]:
        taken = [group for room in sorted(self._by_room) for group in self._by_room[room]]
        self._by_room, self._rooms = {}, 0
        return taken

    def _open(self, length: int, count: int) -> int:
        """New sequences for the rest; best fit fills one before it opens the next."""
        each = self.capacity // length
        full, rest = divmod(count, each)
        if full:
            self._add(Group(full, self.capacity - each * length, [(length, each)]))
        if rest:
            self._add(Group(1, self.capacity - rest * length, [(length, rest)]))
        return 0

    def _fill(self, room: int, length: int, count: int) -> int:
        """Pieces into sequences with exactly ``room``. Returns how many are left."""
        groups = self._by_room[room]
        group = groups.pop(0)
        if not groups:
            del self._by_room[room]
            self._rooms &= ~(1 << room)
        each = room // length
        full, rest = divmod(min(count, group.count * each), each)
        untouched = group.count - full - (rest > 0)
        # Untouched first: it keeps its place in front of groups that came later.
        if untouched:
            self._by_room.setdefault(room, []).insert(0, Group(untouched, room, group.pattern))
            self._rooms |= 1 << room
        if full:
            self._add(Group(full, room - each * length, [*group.pattern, (length, each)]))
        if rest:
            self._add(Group(1, room - rest * length, [*group.pattern, (length, rest)]))
        return count - full * each - rest


def pack_lengths(histogram: np.ndarray, capacity: int, strategy: str) -> list[Group]:
    """Sequences for pieces of given lengths.

    Args:
        histogram: [capacity + 1] pieces of each length; length 0 counts for nothing.
        capacity: tokens of a sequence.
        strategy: ``best_fit`` or ``length_buckets``. The latter cuts the lengths into buckets that halve, (C/2, C],
            (C/4, C/2], ... down to C / FILLER_SHARE, and packs each bucket into sequences of its own; what is shorter
            fills the holes of all of them, and then sequences of its own. So apart from the fillers, no piece of a
            sequence is more than twice as long as another.
    """
    packing = BestFit(capacity)
    filler = capacity // FILLER_SHARE if strategy == "length_buckets" else capacity
    bucket_begin = capacity
    for length in np.flatnonzero(histogram)[::-1].tolist():
        if length == 0:
            continue
        if length <= filler:
            packing.reopen()
        elif length <= bucket_begin:
            packing.close()
            while length <= bucket_begin:
                bucket_begin //= 2
        packing.place(length, int(histogram[length]))
    packing.reopen()
    return packing.groups()


def cut_documents(offsets: np.ndarray, seq_length: int, min_tokens: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of documents, each of 2 to seq_length + 1 tokens.

    Neighbouring pieces of a document share one token, the last label of one and the first input of the next: every
    token of a document but its first is predicted exactly once. Documents of one token predict nothing and are left
    out, as are those below ``min_tokens``.

    Args:
        offsets: int64 [documents + 1], where documents begin, and the end of the last.

    Returns (first token, length), int64 and int32 [pieces], in the order of the file.
    """
    sizes = np.diff(offsets)
    chosen = np.flatnonzero(sizes >= max(2, min_tokens))
    starts, sizes = offsets[chosen], sizes[chosen]
    pieces_each = -(-(sizes - 1) // seq_length)
    ends_before = np.repeat(np.cumsum(pieces_each) - pieces_each, pieces_each)
    place = (np.arange(ends_before.size) - ends_before) * seq_length
    lengths = np.minimum(np.repeat(sizes, pieces_each) - place, seq_length + 1)
    return np.repeat(starts, pieces_each) + place, lengths.astype(np.int32)


def assign(lengths: np.ndarray, groups: list[Group]) -> tuple[np.ndarray, np.ndarray]:
    """Deal actual pieces to the sequences of ``groups``, those of one length in their own order.

    Args:
        lengths: int32 [pieces].

    Returns (piece numbers int64 [pieces] in the order of the sequences, first piece of each sequence int64
    [sequences + 1]).
    """
    # Stable, so that pieces of one length keep the order of the file; 16 bits where they do: a radix sort, O(pieces).
    keys = lengths.astype(np.uint16) if lengths.size and lengths.max() < 2**16 else lengths
    by_length = np.argsort(keys, kind="stable")
    next_piece = np.concatenate([[0], np.cumsum(np.bincount(lengths, minlength=1))]).tolist()
    order = np.empty(lengths.size, dtype=np.int64)
    counts = np.empty(sum(group.count for group in groups), dtype=np.int64)
    at_piece = at_sequence = 0
    for group in groups:
        each = sum(times for _, times in group.pattern)
        block = order[at_piece : at_piece + group.count * each].reshape(group.count, each)
        column = 0
        for length, times in group.pattern:
            begin = next_piece[length]
            next_piece[length] = end = begin + group.count * times
            block[:, column : column + times] = by_length[begin:end].reshape(group.count, times)
            column += times
        counts[at_sequence : at_sequence + group.count] = each
        at_piece, at_sequence = at_piece + group.count * each, at_sequence + group.count
    return order, np.concatenate([[0], np.cumsum(counts)])
