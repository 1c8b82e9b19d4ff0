"""Where a rank stands, in memory that its monitor reads even when the rank is stuck. Standard library only.

Memory that belongs to no file: nothing is left behind, however the processes end. The rank writes a few bytes at each
turn of a step; the monitor (another process, :mod:`hymba_train.guards.monitor`) reads them.
"""

import mmap
import os
import struct
import tempfile

# count: of changes, so that equal marks in a row differ. beat: a thread's, which stops while the GIL is held.
# collectives: begun. order: from the monitor to that thread, an exit code.
FIELDS = ("count", "step", "activity", "beat", "collectives", "order")
SIZE_BYTES = mmap.PAGESIZE

ACTIVITIES = (
    "starting up", "the first step", "waiting for data", "a step", "evaluation, checkpoint or logging", "ending",
)  # fmt: skip
STARTING, FIRST_STEP, LOADING, STEP, BETWEEN, ENDING = range(len(ACTIVITIES))
FAST = (LOADING, STEP)  # guards.hang_seconds; the others have guards.hang_slow_seconds


def anonymous_file() -> int:
    """Descriptor of a file without a name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("hymba_train")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Marks:
    """The shared memory behind a descriptor: one little-endian uint64 a field."""

    def __init__(self, descriptor: int, create: bool = False) -> None:
        if create:
            os.ftruncate(descriptor, SIZE_BYTES)
        self._memory = mmap.mmap(descriptor, SIZE_BYTES)

    def get(self, field: str) -> int:
        return struct.unpack_from("<Q", self._memory, 8 * FIELDS.index(field))[0]

    def set(self, field: str, value: int) -> None:
        struct.pack_into("<Q", self._memory, 8 * FIELDS.index(field), value)

    def move(self, step: int, activity: int) -> None:
        """The rank goes on to another activity."""
        struct.pack_into("<QQQ", self._memory, 0, self.get("count") + 1, step, activity)
