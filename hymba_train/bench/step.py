"""``hymba bench step``: a training step of Hymba-1.5B beside what one would train or write instead, in one run.

Every contender is a process of its own on one GPU: ours in the real training loop (``experiment=bench_1p5b``), a dense
model of the same size in Megatron-Core + Transformer Engine, and Hymba in plain PyTorch. One optimizer step per
micro-batch, no accumulation. A table, JSON, and a picture of where the time of our step goes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hymba_train.bench.timing import Result
from hymba_train.errors import UserError

H200_PEAK = 989.5e12  # dense bf16, FLOP/s, by which every MFU of the table is given, FP8 rows included


@dataclass(frozen=True)
class Contender:
    """``module`` is run with ``arguments``; None: our training loop with these overrides."""

    name: str
    micro_batch: int
    module: str | None = None
    arguments: tuple[str, ...] = ()
    seq_length: int = 2048


def contenders(names: Sequence[str], seq_length: int, overrides: Sequence[str] = ()) -> list[Contender]:
    """names: 'ours:8', 'ours_fp8:8', 'ours_documents:8', 'dense:8', 'dense_fp8:8', 'plain:4': with the micro-batch.
    overrides are for our runs.

    Raises UserError for others.
    """
    kinds = {
        "ours": (None, ()),
        "ours_fp8": (None, ("precision=fp8",)),
        "ours_documents": (None, ("data.document_mask=true",)),
        "dense": ("hymba_train.bench.dense", ()),
        "dense_fp8": ("hymba_train.bench.dense", ("--fp8", "delayed")),
        "plain": ("hymba_train.bench.plain", ()),
    }
    chosen = []
    for text in names:
        name, _, size = text.partition(":")
        if name not in kinds or not size.isdigit() or int(size) < 1:
            raise UserError(f"bench step: {text!r} is no contender; write NAME:MICRO_BATCH, NAME one of {[*kinds]}")
        module, arguments = kinds[name]
        if module is None:
            arguments = (*arguments, *overrides)
        chosen.append(Contender(name, int(size), module, arguments, seq_length))
    return chosen


def run(contender: Contender, steps: int, directory: Path, timeout_seconds: float) -> Result:
    """Raises UserError with the end of its output if it fails."""
    if contender.module is None:
        return _run_ours(contender, steps, directory, timeout_seconds)
    command = [
        sys.executable, "-m", contender.module, "--micro-batch", str(contender.micro_batch),
        "--seq-length", str(contender.seq_length), "--steps", str(steps), *contender.arguments,
    ]  # fmt: skip
    output = call(command, directory / f"{contender.name}_{contender.micro_batch}.log", timeout_seconds)
    return Result(**json.loads([line for line in output.splitlines() if line.startswith("{")][-1]))


def _run_ours(contender: Contender, steps: int, directory: Path, timeout_seconds: float) -> Result:
    name = f"{contender.name}_{contender.micro_batch}x{contender.seq_length}"
    shutil.rmtree(directory / name, ignore_errors=True)
    warm_up = 10
    last = warm_up + steps
    overrides = [
        "experiment=bench_1p5b", f"run.directory={directory}", f"run.name={name}", f"run.train_steps={last + 3}",
        "logging.log_interval=1", f"logging.profile={last + 2}:{last + 3}", "logging.tensorboard=false",
        *batch_overrides(contender.micro_batch, contender.seq_length), *contender.arguments,
    ]  # fmt: skip
    command = [sys.executable, "-m", "hymba_train", "train", *overrides]
    call(command, directory / f"{name}.log", timeout_seconds)
    rows = [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]
    rows = [r for r in rows if r["event"] == "train"]
    timed = [r for r in rows if warm_up < r["step"] <= last]
    ms = statistics.median(r["step_seconds"] for r in timed) * 1e3
    tokens = contender.micro_batch * contender.seq_length
    flops = timed[0]["tflops_per_second_per_device"] * 1e12 / timed[0]["tokens_per_second"]
    parts = [json.loads(p.read_text()) for p in (directory / name / "profile").glob("*.parts.json")]
    return Result(
        contender.name, contender.micro_batch, contender.seq_length, ms, tokens / ms * 1e3, flops,
        timed[-1]["memory_gib"], rows[-1]["loss"], parts[0] if parts else {},
    )  # fmt: skip


def batch_overrides(micro_batch: int, seq_length: int) -> list[str]:
    """Of experiment=bench_1p5b: one micro-batch a step."""
    phase = "data.phases.bench"
    long_context = [f"{phase}.rope_type=ntk"] if seq_length > 2048 else []
    sizes = [f"{phase}.{name}_batch_size={micro_batch}" for name in ("micro", "global")]
    return [f"{phase}.seq_length={seq_length}", *sizes, *long_context]


def call(command: list[str], log: Path, timeout_seconds: float) -> str:
    """What it prints. Raises UserError if it fails or is not done in time; ``log`` has all its output then, too."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds)
    except subprocess.TimeoutExpired as late:
        log.write_bytes((late.stdout or b"") + (late.stderr or b""))
        raise UserError(f"{' '.join(command[2:4])}: not done after {timeout_seconds:.0f} s; see {log}") from late
    log.write_text(done.stdout + done.stderr)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise UserError(f"{' '.join(command[2:4])} exited {done.returncode}: {lines[-1] if lines else ''}; see {log}")
    return done.stdout


def table(results: Sequence[Result]) -> list[str]:
    lines = ["contender        micro-batch    ms/step   tokens/s   MFU (989)   peak GiB     loss"]
    for r in results:
        lines.append(
            f"{r.contender:16} {r.micro_batch:4} x {r.seq_length:5} {r.step_ms:10.1f} {r.tokens_per_second:10,.0f} "
            f"{100 * r.mfu(H200_PEAK):10.1f} % {r.peak_gib:9.1f} {r.loss:8.3f}"
        )
    for r in results:
        if r.parts:
            tokens = r.micro_batch * r.seq_length
            per = {part: ms * 8192 / tokens for part, ms in r.parts.items()}
            shown = ", ".join(f"{part} {ms:.1f}" for part, ms in per.items())
            lines.append(f"{r.contender}:{r.micro_batch} GPU ms per 8,192 tokens: {shown}; sum {sum(per.values()):.1f}")
    return lines


def draw(results: Sequence[Result], path: Path) -> None:
    """Bars of GPU milliseconds per 8,192 tokens, stacked by part, for every contender that was profiled."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    profiled = [r for r in results if r.parts]
    if not profiled:
        return
    parts = sorted({p for r in profiled for p in r.parts}, key=lambda p: -max(r.parts.get(p, 0) for r in profiled))
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.6 * len(profiled)), layout="constrained")
    left = [0.0] * len(profiled)
    labels = [f"{r.contender} {r.micro_batch} x {r.seq_length}" for r in profiled]
    for number, part in enumerate(parts):
        widths = [r.parts.get(part, 0) * 8192 / (r.micro_batch * r.seq_length) for r in profiled]
        axes.barh(labels, widths, left=left, label=part, color=plt.get_cmap("tab20")(number))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.axvline(147, color="black", linestyle="--", linewidth=1)
    axes.text(147, -0.45, " floor (BF16)", fontsize=8)
    axes.set_xlabel("GPU milliseconds per 8,192 tokens")
    axes.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="hymba bench step", description=__doc__)
    parser.add_argument("contenders", nargs="*", default=["ours:8", "ours_fp8:8", "dense:8", "dense_fp8:8", "plain:4"])
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="of our runs")
    parser.add_argument("--timeout", type=float, default=150.0, metavar="SECONDS", help="of each contender")
    args = parser.parse_args(argv)
    directory = args.output.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    results, failures = [], []
    for contender in contenders(args.contenders, args.seq_length, args.override):
        try:
            results.append(run(contender, args.steps, directory, args.timeout))
            print(table(results[-1:])[1], flush=True)
        except UserError as error:
            failures.append(str(error))
            print(f"{contender.name}:{contender.micro_batch} failed: {error}", flush=True)
    (directory / "step.json").write_text(json.dumps([asdict(r) for r in results], indent=1))
    draw(results, directory / "step.png")
    print(*table(results), *failures, sep="\n")
    return 1 if failures else 0
