"""``hymba runs list`` and ``hymba runs show NAME``."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hymba_train.callbacks.curve import draw
from hymba_train.callbacks.jsonl import METRICS, Line, counting, read_lines
from hymba_train.callbacks.progress import format_count
from hymba_train.config.nearest import did_you_mean
from hymba_train.errors import UserError
from hymba_train.parser import Parser
from hymba_train.runs.chart import chart
from hymba_train.runs.slurm_jobs import launches
from hymba_train.runs.summary import RunSummary, find_runs, summarize

COMMANDS = ("list", "show")
COLUMNS = ("run", "state", "step", "tokens", "loss", "checkpoint", "restarts", "goodput")
NARROW, WIDE = 40, 100  # columns of a chart


def main(argv: Sequence[str]) -> int:
    """Run one command (list, if none is given); returns the exit code. Raises UserError."""
    argv = list(argv)
    if not argv or argv[0].startswith("--"):
        argv.insert(0, "list")
    command = argv.pop(0)
    if command in ("-h", "help"):
        argv, command = ["--help"], "list"
    if command not in COMMANDS:
        raise UserError(f"hymba runs {command}: no such command; {did_you_mean(command, COMMANDS, 'commands are')}")
    parser = Parser(prog=f"hymba runs {command}")
    if command == "show":
        parser.add_argument("name", help="name of the run, as `hymba runs list` shows it")
        parser.add_argument("--png", metavar="FILE", help="draw into a PNG file instead of the terminal")
    else:
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.add_argument(
            "--verify", action="store_true", help="read every newest checkpoint and hold it to its checksums"
        )
    parser.add_argument("--directory", default="runs", metavar="DIR", help="run.directory of the runs (default: runs)")
    args = parser.parse_args(argv)
    root = Path(args.directory)
    return show(root, args.name, args.png) if command == "show" else list_runs(root, args.json, args.verify)


def list_runs(root: Path, as_json: bool, verify: bool = False) -> int:
    """Print every run below ``root``. Returns 1 if ``verify`` found a damaged checkpoint, else 0."""
    summaries = [summarize(run, root, verify=verify) for run in find_runs(root)]
    code = int(any(summary.verified is False for summary in summaries))
    if as_json:
        print(json.dumps([dataclasses.asdict(summary) for summary in summaries], indent=1))
        return code
    if not summaries:
        print(f"no runs in {root}")
        return 0
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("run", "state") else "right", no_wrap=True)
    for summary in summaries:
        table.add_row(*(escape(cell) for cell in _cells(summary)))
    # Never squeezed: a narrow terminal breaks the lines itself.
    console = Console(highlight=False, width=max(shutil.get_terminal_size().columns, 140))
    console.print(table)
    for summary in summaries:
        for remark in summary.remarks:
            print(f"{summary.name}: {remark}", file=sys.stderr)
    return code


def _cells(s: RunSummary) -> list[str]:
    """What COLUMNS name."""
    step = f"{s.step}" if s.num_steps is None else f"{s.step}/{s.num_steps}"
    quality = " (damaged)" if s.remarks else " (verified)" if s.verified else ""
    checkpoint = "-" if s.checkpoint is None else f"{s.checkpoint}{quality}"
    loss = "-" if s.loss is None else f"{s.loss:.4f}"
    share = "-" if s.goodput is None else f"{s.goodput:.0%}"
    return [s.name, s.state, step, format_count(s.tokens), loss, checkpoint, str(s.restarts), share]


def show(root: Path, name: str, png: str | None) -> int:
    """Draw loss and throughput of one run. Raises UserError for an unknown run or one without a logged step."""
    runs = {str(run.relative_to(root)): run for run in find_runs(root)}
    if name not in runs:
        raise UserError(f"hymba runs show {name}: no such run in {root}; {did_you_mean(name, runs, 'runs are')}")
    lines = read_lines(runs[name] / METRICS)
    train = counting(lines, "train")
    if not train:
        raise UserError(f"{runs[name] / METRICS}: no step has been logged yet")
    if png is not None:
        try:
            draw(lines, Path(png), name)
        except OSError as error:
            raise UserError(f"--png {png}: cannot be written ({error.strerror or error})") from error
        print(png)
        return 0
    summary = summarize(runs[name], root)
    for label, cell in zip(COLUMNS, _cells(summary), strict=True):
        print(f"{label:<11} {cell}")
    for launch in launches(runs[name]):
        print(f"{'job':<11} {' '.join(map(str, launch.get('jobs', [])))}: {launch.get('script')}")
    for line in _held_out(lines):
        print(line)
    width = min(max(shutil.get_terminal_size().columns - 20, NARROW), WIDE)
    tokens = [line["tokens"] for line in train]
    for title, key, y_format in (
        ("loss (nats per token)", "loss", ".3f"), ("tokens per second", "tokens_per_second", ",.0f")
    ):  # fmt: skip
        values = [float("nan") if line[key] is None else line[key] for line in train]
        print(f"\n{title}")
        print("\n".join(chart(tokens, values, width, 12, "tokens", y_format)))
    return 0


def _held_out(lines: list[Line]) -> list[str]:
    validation = counting(lines, "validation")
    if not validation:
        return []
    last = validation[-1]
    losses = "  ".join(f"{k} {'nan' if v is None else f'{v:.4f}'}" for k, v in last["loss"].items())
    return [f"{'held out':<11} {losses} (step {last['step']})"]
