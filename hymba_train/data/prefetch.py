"""Prepare the next steps' micro-batches while the current one computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _Item(Generic[T]):
    value: T


@dataclass(frozen=True)
class _End:
    error: BaseException | None = None


class Prefetcher(Generic[T]):
    """Iterate over ``items`` with a thread that works up to ``depth`` items ahead.

    Order and content are those of ``items``; an exception raised there is raised here, in its place in the order.
    Close it (or use it as a context manager) to stop the thread early.
    """

    def __init__(self, items: Iterable[T], depth: int = 2) -> None:
        self._queue: queue.Queue[_Item[T] | _End] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(iter(items),), name="prefetch", daemon=True)
        self._thread.start()
        self._over = False

    def _put(self, entry: _Item[T] | _End) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def _work(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if not self._put(_Item(item)):
                    return
        except BaseException as error:  # handed over to the thread that reads
            self._put(_End(error))
        else:
            self._put(_End())

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._over:
            raise StopIteration
        entry = self._queue.get()
        if isinstance(entry, _Item):
            return entry.value
        self._over = True
        raise StopIteration if entry.error is None else entry.error

    def close(self) -> None:
        """Stop the thread; items prepared so far are dropped."""
        self._stop.set()
        self._over = True
        self._thread.join()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
