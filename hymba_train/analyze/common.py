"""Arguments, loading and output that the analyses have in common."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hymba_train import __version__
from hymba_train.errors import UserError
from hymba_train.parser import Parser

DIGITS = 6  # of numbers in JSON
WIDE = 400  # columns that a table may take


def make_parser(name: str, description: str) -> Parser:
    parser = Parser(prog=f"hymba analyze {name}", description=description)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help=f"for {name}.json and the pictures")
    return parser


def add_text_arguments(parser: argparse.ArgumentParser, *, sequences: int, length: int) -> None:
    """Flags that say which text, for :func:`hymba_train.analyze.texts.read_texts`."""
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="plain text, a domain each; instead of held-out text",
    )
    parser.add_argument("--data", type=Path, metavar="RUN_OR_STEP", help="whose held-out text (default: its own run)")
    parser.add_argument("--data-path", metavar="DIR", help="where that run's data lies now, instead of its data.path")
    parser.add_argument("--sequences", type=int, default=sequences, help=f"of each domain (default {sequences})")
    parser.add_argument(
        "--length", type=int, default=length,
        help=f"tokens of a sequence, at most (default {length}; of held-out text, as many as the run trained on)",
    )  # fmt: skip


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises UserError for an option that is below 1."""
    for name in names:
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least 1")


def parse_numbers(option: str, text: str, *, least: int = 1) -> list[int]:
    """Numbers of a list such as "1024,8192". Raises UserError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) >= least for part in parts):
        raise UserError(f"{option} {text!r}: give whole numbers from {least} up, with commas between them")
    return [int(part) for part in parts]


def make_directory(path: Path) -> None:
    """Before anything is computed, so that an hour's work is not lost. Raises UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be made ({error.strerror or error})") from error


def write_json(output: Path, name: str, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """``output``/``name``.json: analysis, version, settings, and the results beside them. Raises UserError."""
    content = {"analysis": name, "hymba_train": __version__, "settings": settings, **results}
    path = output / f"{name}.json"
    try:
        path.write_text(json.dumps(plain(content), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror or error})") from error


def plain(value: Any) -> Any:
    """What JSON can hold: tensors as lists, numbers rounded, what is not finite as null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """The first column to the left, the others to the right."""
    if title is not None:
        print(title)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    Console(highlight=False, width=WIDE).print(table)  # never squeezed: a narrow terminal breaks the lines itself


def print_files(output: Path, names: Iterable[str]) -> None:
    print("\n".join(str(output / name) for name in names))
