"""How far a tool is: one line that renews itself on a terminal, a line a minute in a log."""

from __future__ import annotations

import contextlib
import sys
import time

TERMINAL_SECONDS, LOG_SECONDS = 0.5, 60.0
BAR_CELLS = 20


class Progress:
    """A bar, the share done, MB of text, MB/s and the time left, on standard error. Silent unless ``show``.

    Args:
        total_bytes: of all input, as stored.
    """

    def __init__(self, total_bytes: int, show: bool) -> None:
        self.total_bytes, self.show = total_bytes, show
        self.read_bytes = self.text_bytes = 0
        self.start_seconds = time.monotonic()
        self._last_seconds = self.start_seconds
        self._on_terminal = sys.stderr.isatty()

    def update(self, read_bytes: int, text_bytes: int) -> None:
        """So many bytes of all input are done, which held so many bytes of text: both from the start."""
        self.read_bytes, self.text_bytes = read_bytes, text_bytes
        now = time.monotonic()
        if not self.show or now - self._last_seconds < (TERMINAL_SECONDS if self._on_terminal else LOG_SECONDS):
            return
        self._last_seconds = now
        line = self.line(now - self.start_seconds)
        with contextlib.suppress(OSError):
            print(f"\r{line} " if self._on_terminal else line, end="" if self._on_terminal else "\n", file=sys.stderr,
                  flush=True)  # fmt: skip

    def line(self, elapsed_seconds: float) -> str:
        """The line after so many seconds."""
        share = min(1.0, self.read_bytes / max(1, self.total_bytes))
        left_seconds = round(elapsed_seconds * (1 - share) / share) if share else 0
        left = f"{left_seconds // 3600}:{left_seconds // 60 % 60:02}:{left_seconds % 60:02} left" if share else ""
        megabytes = self.text_bytes / 1e6
        full = int(share * BAR_CELLS)
        rate = megabytes / max(elapsed_seconds, 1e-9)
        return f"[{'#' * full}{'.' * (BAR_CELLS - full)}] {share:6.1%}  {megabytes:,.1f} MB  {rate:.1f} MB/s  {left}"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.show and self._on_terminal:
            with contextlib.suppress(OSError):
                print("\r" + " " * 79 + "\r", end="", file=sys.stderr, flush=True)
