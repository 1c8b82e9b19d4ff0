"""Loss curves of Hymba-1.5B in BF16 and in FP8 on the same real text: how far apart they are, held-out loss above all.

python -m benchmarks.fp8_curves --override data.path=build/compare-data [--steps 300] [--timeout SECONDS]

Two runs of ``hymba train experiment=bench_1p5b``, one after the other: the same seed and batches (their hashes are
compared), alike but for --change. Warm-up over a tenth of the steps, then a cosine. Held-out losses every --window
steps, mean over the domains of real text. A table, curves.json and curves.png; a run that --timeout ends counts as far
as it came. If the data's tokenizer has another number of tokens than the model's vocabulary, the model takes it on.
--base takes the first run from an earlier comparison: with --change precision.norm_backend=torch the second one differs
from it by rounding alone, which shows what is noise.
Returns 0 only if every held-out loss of all the steps is within --limit.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hymba_train.bench.step import batch_overrides, call
from hymba_train.callbacks.jsonl import counting, read_lines
from hymba_train.config import compose
from hymba_train.data.build import load_tokenizer
from hymba_train.errors import UserError
from hymba_train.figures import pyplot

FIRST_STEPS = 10  # of which the speed says nothing


@dataclass(frozen=True)
class Curve:
    """One run as far as it came. Losses in nats per token, by step."""

    name: str
    loss: dict[int, float]
    held_out: dict[int, float]  # mean over the domains
    batches: dict[int, str]  # hashes of their tokens
    tokens_per_second: float | None  # by the median step
    guard_events: int  # bad steps among them, which are not applied
    start: dict[str, Any]  # device, layout ...

    @property
    def last_step(self) -> int:
        return max(self.loss, default=0)


def overrides(args: argparse.Namespace) -> list[str]:
    """Of both runs. Raises UserError for a configuration or a tokenizer that cannot be read."""
    chosen = [
        "experiment=bench_1p5b", f"data.phases.bench.tokens={args.steps * args.micro_batch * args.seq_length}",
        *batch_overrides(args.micro_batch, args.seq_length), "data.validation_sequences=32",
        *(f"data.sources.{name}.validation_fraction=0.05" for name in ("books", "speeches", "docs", "code")),
        "schedule=cosine", "schedule.lr_warmup_fraction=0.1", "optim.lr=3e-4", "optim.min_lr=3e-5",
        "logging.log_interval=1", f"logging.eval_interval={args.window}", "logging.batch_hash=true",
        "logging.tensorboard=false", f"run.directory={args.output.absolute()}", *args.override,
    ]  # fmt: skip
    config = compose(chosen)
    size = load_tokenizer(config.data).vocab_size
    if size != config.model.vocab_size:
        print(f"the model's vocabulary is the tokenizer's {size} tokens, not {config.model.vocab_size}", flush=True)
        chosen.append(f"model.vocab_size={size}")
    return chosen


def read(name: str, metrics: Path) -> Curve:
    lines = read_lines(metrics)
    train = counting(lines, "train")
    held_out = {
        line["step"]: statistics.fmean(map(_number, line["loss"].values())) for line in counting(lines, "validation")
    }
    speeds = [line["tokens_per_second"] for line in train if line["step"] > FIRST_STEPS]
    return Curve(
        name, {line["step"]: _number(line["loss"]) for line in train}, held_out,
        {line["step"]: line["batch_hash"] for line in train}, statistics.median(speeds) if speeds else None,
        sum(line["event"] == "guard" for line in lines), next((x for x in lines if x["event"] == "start"), {}),
    )  # fmt: skip


def _number(loss: float | None) -> float:
    return math.nan if loss is None else loss


def percent(first: float, second: float) -> float:
    return 100 * (second / first - 1)


def compare(first: Curve, second: Curve, window: int) -> list[dict[str, float | None]]:
    """A row for every window of steps that both have: mean training loss and, at its end, held-out loss of each, and
    the differences of the second one in percent. Raises UserError if they did not see the same batches."""
    common = range(1, min(first.last_step, second.last_step) + 1)
    different = [step for step in common if first.batches.get(step) != second.batches.get(step)]
    if different:
        raise UserError(f"step {different[0]}: the runs did not train on the same batch")
    rows = []
    for end in range(window, len(common) + 1, window):
        train = [_window(curve, end, window) for curve in (first, second)]
        held_out = [curve.held_out.get(end) for curve in (first, second)]
        row = {"step": end, "train": train, "train_percent": percent(*train), "held_out": held_out}
        rows.append(row | {"held_out_percent": None if None in held_out else percent(*held_out)})
    return rows


def _window(curve: Curve, end: int, size: int) -> float:
    return statistics.fmean(curve.loss[step] for step in range(max(1, end - size + 1), end + 1) if step in curve.loss)


def verdict(rows: Sequence[dict], steps: int, limit: float) -> tuple[bool, str]:
    """Whether every held-out loss up to ``steps`` is there and within ``limit`` percent; and that in words."""
    evaluated = [row for row in rows if row["held_out_percent"] is not None]
    last = evaluated[-1]["step"] if evaluated else 0
    beyond = [row for row in evaluated if not abs(row["held_out_percent"]) <= limit]
    if beyond:
        step, apart = beyond[0]["step"], beyond[0]["held_out_percent"]
        return False, f"held-out loss: {apart:+.3f} % at step {step}, beyond {limit} %"
    if last < steps:
        return False, f"not decided: held-out losses of both only up to step {last} of {steps}, so far within {limit} %"
    most = max(abs(row["held_out_percent"]) for row in evaluated)
    return True, f"held-out loss: at most {most:.3f} % apart over {steps} steps, within {limit} %"


def table(curves: Sequence[Curve], rows: Sequence[dict], window: int) -> list[str]:
    names = [f"{curve.name[:14]:>14}" for curve in curves]
    lines = [
        f"        {f'training loss, mean of {window} steps':44}held-out loss, mean of the domains",
        f"{'step':>6}  {names[0]} {names[1]}   difference  {names[0]} {names[1]}   difference",
    ]
    for row in rows:
        cells = f"{row['step']:6}  {row['train'][0]:14.4f} {row['train'][1]:14.4f} {row['train_percent']:+10.3f} %"
        if row["held_out_percent"] is not None:
            cells += f"  {row['held_out'][0]:14.4f} {row['held_out'][1]:14.4f} {row['held_out_percent']:+10.3f} %"
        lines.append(cells)
    for curve in curves:
        speed = "-" if curve.tokens_per_second is None else f"{curve.tokens_per_second:,.0f}"
        bad = f", {curve.guard_events} events of guards" if curve.guard_events else ""
        lines.append(f"{curve.name}: {curve.last_step} steps, {speed} tokens/s by the median step{bad}")
    return lines


def draw(curves: Sequence[Curve], rows: Sequence[dict], limit: float, path: Path) -> None:
    """Above both runs' losses, below their differences in percent."""
    plt = pyplot()
    figure, (above, below) = plt.subplots(2, figsize=(8, 7), sharex=True, layout="constrained")
    for number, curve in enumerate(curves):
        above.plot(curve.loss.keys(), curve.loss.values(), f"C{number}", linewidth=0.8, label=f"{curve.name}, training")
        above.plot(curve.held_out.keys(), curve.held_out.values(), f"C{number}o--", label=f"{curve.name}, held out")
    for name, label, style in (("train_percent", "training", "C2."), ("held_out_percent", "held out", "C3o")):
        points = [(row["step"], row[name]) for row in rows if row[name] is not None]
        if points:
            below.plot(*zip(*points, strict=True), f"{style}-", label=label)
    below.axhspan(-limit, limit, alpha=0.15, color="gray", label=f"{limit} %")
    above.set(ylabel="loss (nats per token)")
    below.set(xlabel="step", ylabel=f"{curves[1].name} above {curves[0].name} (%)")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--window", type=int, default=50, metavar="STEPS", help="of a mean, and between evaluations")
    parser.add_argument("--change", default="precision=fp8", metavar="KEY=VALUE", help="what the second run has")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="of both runs")
    parser.add_argument(
        "--base", type=Path, metavar="METRICS", help="metrics.jsonl of a first run that was made before"
    )
    parser.add_argument("--limit", type=float, default=0.5, metavar="PERCENT", help="between held-out losses")
    parser.add_argument("--output", type=Path, default=Path("build/fp8_curves"))
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS", help="of the whole")
    args = parser.parse_args(arguments)
    deadline = time.monotonic() + args.timeout
    try:
        common = overrides(args)
    except UserError as error:
        print(error)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    curves, failures = [], []
    for number, (name, change) in enumerate((("base", []), (args.change, [args.change]))):
        if number == 0 and args.base:
            curves.append(read(name, args.base))
            continue
        run = ("base", "changed")[number]
        shutil.rmtree(args.output / run, ignore_errors=True)
        command = [sys.executable, "-m", "hymba_train", "train", *common, *change, f"run.name={run}"]
        seconds = max((deadline - time.monotonic()) / (2 - number), 1.0)  # the second run has what the first one left
        try:
            call(command, args.output / f"{run}.log", seconds)
        except UserError as error:
            failures.append(f"{name}: {error}")
            print(failures[-1], flush=True)
        curves.append(read(name, args.output / run / "metrics.jsonl"))
        print(f"{name}: {curves[-1].last_step} of {args.steps} steps", flush=True)
    good = report(curves, failures, args)
    return 0 if good else 1


def report(curves: Sequence[Curve], failures: Sequence[str], args: argparse.Namespace) -> bool:
    """Files and table; whether all is well."""
    rows: list[dict] = []
    try:
        rows = compare(*curves, args.window)
        good, words = verdict(rows, args.steps, args.limit)
    except UserError as error:
        good, words = False, str(error)
    found = {"rows": rows, "verdict": words, "good": good, "failures": failures, "curves": [asdict(c) for c in curves]}
    (args.output / "curves.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    draw(curves, rows, args.limit, args.output / "curves.png")
    print(*table(curves, rows, args.window), *failures, words, sep="\n")
    return good and not failures


if __name__ == "__main__":
    sys.exit(main())
