"""Logs of one JSON object a line, which one process after another appends to, and any may die while it writes."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any, TextIO


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All objects in the order in which they were written; torn lines are left out. Empty if there is no file."""
    records: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                records.append(record)
    return records


def open_to_append(path: Path) -> TextIO:
    """A file to write whole lines into. What a dead process has left of a line is ended first, apart from the next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+b")  # noqa: SIM115  (handed to the caller)
    if file.tell():
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return io.TextIOWrapper(file, encoding="utf-8")


def finite(value: Any) -> Any:
    """``value`` as JSON can hold it: null for NaN and infinities, at any depth of dicts and lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return value
