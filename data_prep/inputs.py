"""What ``--input`` means: files, directories and patterns to an ordered list of shards."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hymba_train.errors import UserError

JSONL, PARQUET = "jsonl", "parquet"
SUFFIXES = {
    ".jsonl": (JSONL, ""), ".jsonl.gz": (JSONL, "gzip"), ".jsonl.zst": (JSONL, "zstd"), ".jsonl.zstd": (JSONL, "zstd"),
    ".json": (JSONL, ""), ".json.gz": (JSONL, "gzip"), ".json.zst": (JSONL, "zstd"), ".parquet": (PARQUET, ""),
}  # fmt: skip
"""Ending of a file name -> (format, compression). ``.json`` files hold JSON lines too (C4, Pile, Dolma)."""


@dataclass(frozen=True)
class InputFile:
    """One input shard.

    Attributes:
        name: the file's path below the directory that was given, or its name: with ``/`` and endings, unique.
    """

    path: Path
    name: str
    format: str
    compression: str

    @property
    def stem(self) -> str:
        """``name`` without its ending: where the output of this shard goes, below the output directory."""
        return self.name[: -len(_suffix(self.name))]

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size


def find_inputs(given: Sequence[str | Path], part: tuple[int, int] = (0, 1)) -> list[InputFile]:
    """Shards named by files, directories (searched through, sorted by name) and patterns (``*``, ``**``).

    Args:
        part: (i, n): only the shards i, i + n, i + 2n, ... of the list: the share of one of n jobs.

    Raises UserError: nothing there, an ending that is not known, or two shards of one name.
    """
    files: list[InputFile] = []
    problems = []
    for item in map(str, given):
        try:
            files += _expand(item)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    twice = [name for name, count in Counter(file.stem for file in files).items() if count > 1]
    if twice:
        raise UserError(f"two inputs are called {twice[0]}: rename one, or give their common directory")
    index, count = part
    return files[index::count]


def _expand(item: str) -> list[InputFile]:
    path = Path(item)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p.name))
        if not found:
            raise UserError(f"{item} holds no input: {_known()} are looked for")
        return [_input(p, p.relative_to(path).as_posix()) for p in found]
    if path.is_file():
        return [_input(path, path.name)]
    if glob.has_magic(item):
        found = sorted(Path(p) for p in glob.glob(item, recursive=True) if Path(p).is_file())
        if not found:
            raise UserError(f"no file matches {item}")
        root = os.path.dirname(item[: glob.magic_check.search(item).start()])  # what stands before the pattern
        return [_input(p, p.relative_to(root).as_posix()) for p in found]
    raise UserError(f"{item} does not exist")


def _input(path: Path, name: str) -> InputFile:
    suffix = _suffix(path.name)
    if not suffix:
        raise UserError(f"{path}: the ending tells no known format: {_known()}")
    return InputFile(path, name, *SUFFIXES[suffix])


def _suffix(name: str) -> str:
    """Longest known ending of a name, or ''."""
    return max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default="")


def _known() -> str:
    return ", ".join(SUFFIXES)
