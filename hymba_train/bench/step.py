"""``hymba bench step``: a training step of Hymba-1.5B beside what one would train or write instead, in one run.

Every contender is a process of its own on one GPU: ours in the real training loop (``experiment=bench_1p5b``), a dense
model of the same size in Megatron-Core + Transformer Engine, and Hymba in plain PyTorch. One optimizer step per
micro-batch, no accumulation. On two GPUs ours runs under every layout, too (``ours_dp2:12``; two pipeline stages take
eight micro-batches a step). A table, JSON, and a picture of where the time of our step goes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hymba_train.bench.timing import Result
from hymba_train.errors import UserError
from hymba_train.figures import pyplot

H200_PEAK = 989.5e12  # dense bf16, FLOP/s, by which every MFU of the table is given, FP8 rows included


@dataclass(frozen=True)
class Contender:
    """``module`` is run with ``arguments``; None: our training loop with these overrides."""

    name: str
    micro_batch: int
    module: str | None = None
    arguments: tuple[str, ...] = ()
    seq_length: int = 2048
    gpus: int = 1
    per_step: int = 1  # micro-batches in a step, over all GPUs


LAYOUTS: dict[str, tuple[tuple[str, ...], int]] = {
    "dp2": ((), 2),
    "tp2": (("parallel=tp2", "parallel.sequence=true"), 1),
    "pp2": (("parallel=pp2",), 8),
}
"""Of two GPUs: overrides, micro-batches in a step."""


def contenders(names: Sequence[str], seq_length: int, overrides: Sequence[str] = ()) -> list[Contender]:
    """names: 'ours:8', 'ours_fp8:8', 'ours_documents:8', 'dense:8', 'dense_fp8:8', 'plain:4': with the micro-batch;
    of ours also with a layout of :data:`LAYOUTS`: 'ours_fp8_dp2:8'. overrides are for our runs.

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
        kind, _, layout = name.rpartition("_")
        if layout not in LAYOUTS or kinds.get(kind, "")[:1] != (None,):
            kind, layout = name, ""
        if kind not in kinds or not size.isdigit() or int(size) < 1:
            raise UserError(
                f"bench step: {text!r} is no contender; write NAME:MICRO_BATCH, NAME one of {[*kinds]}; ours also "
                f"with _{', _'.join(LAYOUTS)} behind"
            )
        module, arguments = kinds[kind]
        more, per_step = LAYOUTS.get(layout, ((), 1))
        if module is None:
            arguments = (*arguments, *more, *overrides)
        chosen.append(Contender(name, int(size), module, arguments, seq_length, 2 if layout else 1, per_step))
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
    sequences = contender.micro_batch * contender.per_step * (last + 3)
    overrides = [
        "experiment=bench_1p5b", f"data.phases.bench.tokens={sequences * contender.seq_length}",
        f"run.directory={directory}", f"run.name={name}", f"run.train_steps={last + 3}",
        "logging.log_interval=1", f"logging.profile={last + 2}:{last + 3}", "logging.tensorboard=false",
        *batch_overrides(contender.micro_batch, contender.seq_length, contender.per_step), *contender.arguments,
    ]  # fmt: skip
    nproc = ["--nproc", str(contender.gpus)] if contender.gpus > 1 else []
    command = [sys.executable, "-m", "hymba_train", "train", *nproc, *overrides]
    call(command, directory / f"{name}.log", timeout_seconds)
    rows = [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]
    rows = [r for r in rows if r["event"] == "train"]
    timed = [r for r in rows if warm_up < r["step"] <= last]
    ms = statistics.median(r["step_seconds"] for r in timed) * 1e3
    tokens = contender.micro_batch * contender.seq_length * contender.per_step / contender.gpus
    flops = timed[0]["tflops_per_second_per_device"] * 1e12 * contender.gpus / timed[0]["tokens_per_second"]
    parts = [json.loads(p.read_text()) for p in sorted((directory / name / "profile").glob("*.parts.json"))]
    return Result(
        contender.name, contender.micro_batch, contender.seq_length, ms, tokens / ms * 1e3, flops,
        timed[-1]["memory_gib"], rows[-1]["loss"], parts[0] if parts else {}, contender.gpus,
    )  # fmt: skip


def batch_overrides(micro_batch: int, seq_length: int, per_step: int = 1) -> list[str]:
    """Of experiment=bench_1p5b: so many micro-batches a step."""
    phase = "data.phases.bench"
    long_context = [f"{phase}.rope_type=ntk"] if seq_length > 2048 else []
    sizes = [f"{phase}.micro_batch_size={micro_batch}", f"{phase}.global_batch_size={micro_batch * per_step}"]
    return [f"{phase}.seq_length={seq_length}", *sizes, *long_context]


def call(command: list[str], log: Path, timeout_seconds: float) -> str:
    """What it prints. Raises UserError if it fails or is not done in time; ``log`` has all its output then, too."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    ) as child:
        try:
            output, errors = child.communicate(timeout=timeout_seconds)
        except BaseException as end:
            os.killpg(child.pid, signal.SIGKILL)  # torchrun, too, or its ranks would keep the GPUs
            log.write_text("".join(child.communicate()))
            if not isinstance(end, subprocess.TimeoutExpired):
                raise
            raise UserError(f"{' '.join(command[2:4])}: not done after {timeout_seconds:.0f} s; see {log}") from end
    log.write_text(output + errors)
    if child.returncode:
        lines = (output + errors).strip().splitlines()
        # Behind it there may be warnings, and torchrun's summary, which speaks of errors and names none.
        telling = [line for line in lines if re.search(r"error: +\S", line, re.IGNORECASE)]
        last = (telling or lines or [""])[-1]
        raise UserError(f"{' '.join(command[2:4])} exited {child.returncode}: {last}; see {log}")
    return output


def table(results: Sequence[Result]) -> list[str]:
    lines = ["contender        micro-batch    ms/step tokens/s/GPU  MFU (989)   peak GiB     loss"]
    for r in results:
        lines.append(
            f"{r.contender:16} {r.micro_batch:4} x {r.seq_length:5} {r.step_ms:10.1f} {r.tokens_per_second:12,.0f} "
            f"{100 * r.mfu(H200_PEAK):10.1f} % {r.peak_gib:9.1f} {r.loss:8.3f}"
        )
    for r in results:
        if r.parts:
            per = {part: ms * 8192 / r.tokens for part, ms in r.parts.items()}
            shown = ", ".join(f"{part} {ms:.1f}" for part, ms in per.items())
            lines.append(f"{r.contender}:{r.micro_batch} GPU ms per 8,192 tokens: {shown}; sum {sum(per.values()):.1f}")
    return lines


def draw(results: Sequence[Result], path: Path) -> None:
    """Bars of GPU milliseconds per 8,192 tokens, stacked by part, for every contender that was profiled."""
    plt = pyplot()
    profiled = [r for r in results if r.parts]
    if not profiled:
        return
    parts = sorted({p for r in profiled for p in r.parts}, key=lambda p: -max(r.parts.get(p, 0) for r in profiled))
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.6 * len(profiled)), layout="constrained")
    left = [0.0] * len(profiled)
    labels = [f"{r.contender} {r.micro_batch} x {r.seq_length}" for r in profiled]
    for number, part in enumerate(parts):
        widths = [r.parts.get(part, 0) * 8192 / r.tokens for r in profiled]
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
