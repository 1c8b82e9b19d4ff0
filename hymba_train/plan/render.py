"""A plan for people (tables) and for tools (JSON)."""

from __future__ import annotations

import dataclasses
import io
import shutil
import sys
from collections.abc import Sequence
from typing import IO, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hymba_train.config.document import meaning_of
from hymba_train.describe import LayerDescription, cache_bytes
from hymba_train.describe.flops import BACKWARD_FACTOR
from hymba_train.plan.checkpoints import checkpoint_sizes
from hymba_train.plan.measured import estimate_times
from hymba_train.plan.plan import Plan
from hymba_train.plan.suggest import Suggestion

MIN_WIDTH = 150
"""Tables are never squeezed below what they need; a narrower terminal breaks the lines itself."""
PAPER_TOKENS = 8000
"""Tokens at which the paper's Tables 1, 2 and 10 give the cache."""


def kv_text(layer: LayerDescription) -> str:
    """'producer -> 2', 'consumer <- 1', 'own', or '-' without attention."""
    if layer.kv_role == "producer":
        return "producer -> " + ", ".join(map(str, layer.kv_consumers))
    if layer.kv_role == "consumer":
        return f"consumer <- {layer.kv_source}"
    return "own" if layer.kv_role == "own" else "-"


def print_plan(plan: Plan, file: IO[str] | None = None, gpu: str | None = None) -> None:
    """Tables on a terminal; the same in plain characters and without a width limit when piped into a file.

    ``gpu``: whose measured speeds give the time; None: all that were measured.
    """
    file = file or sys.stdout
    console = Console(file=file, highlight=False, soft_wrap=True)
    if console.is_terminal:
        console = Console(file=file, highlight=False, soft_wrap=True, width=max(console.width, MIN_WIDTH))
        _print(plan, console, gpu)
        return
    text = io.StringIO()
    _print(plan, Console(file=text, highlight=False, width=MIN_WIDTH, no_color=True), gpu)
    file.write("\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n")


def _print(plan: Plan, console: Console, gpu: str | None) -> None:
    console.print(f"[bold]{_title(plan)}[/bold]")
    console.print(_layer_table(plan))
    console.print(_stage_table(plan))
    console.print(_memory_table(plan))
    if plan.phases:
        console.print(_phase_table(plan))
    console.print(_flops_table(plan))
    for line in [*_time_lines(plan, gpu), *_size_lines(plan)]:
        console.print(line, markup=False)
    for key in plan.to_be_given:
        console.print(f"[yellow]to be given:[/yellow] {key} ({escape(meaning_of(key).rstrip('.'))})")
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)


def _title(plan: Plan) -> str:
    p = plan.config.parallel
    parts = [f"data {plan.data_parallel}", f"tensor {p.tensor}", f"pipeline {p.pipeline}"]
    if p.virtual_pipeline > 1:
        parts.append(f"virtual {p.virtual_pipeline}")
    if p.sequence:
        parts.append("sequence parallel")
    processes = "1 process" if plan.world_size == 1 else f"{plan.world_size} processes"
    return f"{plan.config.model.name}: {plan.num_parameters:,} parameters; {processes}: {' x '.join(parts)}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, title_style="bold")
    table.min_width = len(title)
    for column in columns:
        name, _, left = column.partition("|")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    return table


def _layer_table(plan: Plan) -> Table:
    has_virtual = plan.config.parallel.virtual_pipeline > 1
    columns = ["layer", "mixer|left", "span|left", "K/V|left", "FFN|left", "stage", *(["chunk"] if has_virtual else [])]
    table = _table("Layers", *columns, "parameters", "MFLOP/token")
    for row in plan.layers:
        layer = row.description
        span = f"window {layer.window}" if layer.window is not None and layer.has_attention else layer.span
        cells = [str(layer.index), layer.mixer, span, kv_text(layer), "gated" if layer.has_ffn else "-"]
        cells += [str(row.pipeline_rank), *([str(row.virtual_rank)] if has_virtual else [])]
        table.add_row(*cells, f"{row.num_parameters:,}", f"{row.flops_per_token / 1e6:.1f}")
    return table


def _stage_table(plan: Plan) -> Table:
    """Work of each stage and what K/V it is handed; see _memory_table for bytes."""
    cut = sum(len(border.kv_producers) for border in plan.borders)
    groups = f"{cut} KV groups cut" if cut != 1 else "1 KV group cut"
    title = f"Stages (busiest over mean: {plan.balance:.3f}; {groups})"
    table = _table(title, "stage", "layers|left", "MFLOP/token", "of the mean", "receives K/V of|left")
    crossing = {border.layer: border for border in plan.borders}
    mean = sum(chunk.flops_per_token for chunk in plan.chunks) / len(plan.memory)
    for stage in plan.memory:
        own = [chunk for chunk in plan.chunks if chunk.pipeline_rank == stage.pipeline_rank]
        flops = sum(chunk.flops_per_token for chunk in own)
        received = [crossing[c.layers.start] for c in own if c.layers.start in crossing]
        kv = ", ".join(
            f"layer {', '.join(map(str, b.kv_producers))} ({b.kv_width} values a token)"
            for b in received
            if b.kv_producers
        )
        table.add_row(
            str(stage.pipeline_rank), ", ".join(f"{c.layers.start}..{c.layers.stop - 1}" for c in own),
            f"{flops / 1e6:.1f}", f"{flops / mean:.3f}", kv or "-",
        )  # fmt: skip
    return table


def _memory_table(plan: Plan) -> Table:
    """Bytes of a GPU by part; activations for both choices of parallel.recompute."""
    columns = ("stage", "parameters", "weights", "gradients", "optimizer", "activations", "(recomputed)", "logits")
    table = _table("GiB of a GPU, without CUDA, NCCL and fragments", *columns, "buffers", "total")
    for s in plan.memory:
        parts = [s.weight_bytes, s.gradient_bytes, s.optimizer_bytes]
        if plan.phases:
            recomputed = s.activation_bytes_by_recompute["full"]
            parts += [s.activation_bytes, recomputed, s.logit_bytes, s.buffer_bytes]
        cells = [*map(_gib, parts), *["-"] * (7 - len(parts)), _gib(s.total_bytes)]
        table.add_row(str(s.pipeline_rank), f"{s.held_parameters:,}", *cells)
    return table


def _gib(num_bytes: int) -> str:
    gib = num_bytes / 2**30
    return f"{gib:.1f}" if gib >= 1 else f"{gib:.2f}"


def _phase_table(plan: Plan) -> Table:
    title = "Phases"
    if plan.steps is not None:
        title += f" ({plan.steps.num_steps:,} steps, {plan.steps.num_tokens:,} tokens)"
    columns = ("phase|left", "steps", "tokens", "sequence", "batch", "micro-batch", "micro-batches", "tokens/step")
    table = _table(title, *columns, "RoPE base", "GFLOP/token", "bubble")
    for phase in plan.phases:
        table.add_row(
            phase.name, f"{phase.num_steps:,}", f"{phase.num_tokens:,}", f"{phase.seq_length:,}",
            f"{phase.global_batch_size:,}", str(phase.micro_batch_size), str(phase.num_micro_batches),
            f"{phase.tokens_per_step:,}", f"{phase.rotary_base:,.2f}", f"{phase.training_flops_per_token / 1e9:.3f}",
            f"{phase.bubble_fraction:.1%}",
        )  # fmt: skip
    return table


def _flops_table(plan: Plan) -> Table:
    title = f"FLOPs per text token (sequences of {plan.planning_seq_length:,})"
    table = _table(title, "part|left", "forward M", "share")
    total = sum(plan.flops.values())
    for part, flops in plan.flops.items():
        if flops:
            table.add_row(part, f"{flops / 1e6:.1f}", f"{flops / total:.1%}")
    table.add_section()
    table.add_row("forward and backward", f"{BACKWARD_FACTOR * total / 1e6:.1f}", "")
    return table


def _time_lines(plan: Plan, gpu: str | None) -> list[str]:
    """Step time and days where this code was measured under this very setting."""
    lines = []
    for estimate in estimate_times(plan, gpu) if plan.phases else []:
        steps = [
            f"{phase.phase} {phase.step_seconds:.3g} s a step" if phase.step_seconds else f"{phase.phase} not measured"
            for phase in estimate.phases
        ]
        days = "" if estimate.days is None else f"; {estimate.days:.3g} days in all"
        lines.append(f"time on {estimate.gpu}: {', '.join(steps)}{days}")
        rows = dict.fromkeys(phase.row for phase in estimate.phases if phase.row)
        lines += [
            f"  from {row.tokens_per_second:,.0f} tokens/s a GPU, measured {row.date} at commit {row.commit}; "
            "bubble and balance reckoned, network not"
            for row in rows
        ]
    return lines


def _size_lines(plan: Plan) -> list[str]:
    """Cache at inference, checkpoints, interval between saves."""
    config, lines = plan.config, []
    for num_tokens in sorted({config.model.rope_original_max_positions, config.model.max_position_embeddings}):
        cache = cache_bytes(config.model, num_tokens)
        lines.append(
            f"inference: a sequence of {num_tokens:,} tokens keeps {_mib(cache.total_bytes)} "
            f"(keys and values {_mib(cache.kv_bytes)}, SSM state {_mib(cache.state_bytes)})"
        )
    paper = cache_bytes(config.model, PAPER_TOKENS, "paper").total_bytes
    lines.append(f"inference, counted as in the paper's tables ({PAPER_TOKENS:,} tokens): {paper / 1e6:.2f} MB")
    if config.checkpoint.enabled:
        c = checkpoint_sizes(config, plan.num_parameters, plan.world_size)
        kept = f"{config.checkpoint.keep_last} kept: {_gib(config.checkpoint.keep_last * c.num_bytes)} GiB"
        lines.append(
            f"checkpoints: {_gib(c.num_bytes)} GiB each, {kept}. Saving about every "
            f"{format_minutes(c.best_interval_seconds)} loses least, if writing takes {c.save_seconds:.0f} s (1 GB/s) "
            f"and something fails every {c.hours_between_failures:,.0f} h (as often per GPU as in the Llama 3 report)"
        )
    return lines


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def format_minutes(seconds: float) -> str:
    """
    >>> [format_minutes(s) for s in (90, 3540, 12600, 360000)]
    ['2 min', '59 min', '3.5 h', '100 h']
    """
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.3g} h"


def print_suggestions(suggestions: Sequence[Suggestion], num_gpus: int, memory_gib: float) -> None:
    """Layouts, best first."""
    title = f"Layouts of {num_gpus} GPUs with {memory_gib:g} GiB, by estimated time (1 is perfectly parallel)"
    columns = ("time", "tensor", "pipeline", "data", "micro-batches", "recompute|left", "GiB", "days", "overrides|left")
    table = _table(title, *columns)
    for s in suggestions:
        table.add_row(
            f"{s.relative_time:.2f}", str(s.tensor), str(s.pipeline), str(s.data),
            ", ".join(map(str, s.micro_batch_sizes)), s.recompute, f"{s.memory_gib:.1f}",
            "-" if s.days is None else f"{s.days:.3g}", s.overrides,
        )  # fmt: skip
    width = max([MIN_WIDTH, *(100 + len(s.overrides) for s in suggestions)])
    console = Console(highlight=False, width=max(shutil.get_terminal_size().columns, width))
    console.print(table)
    console.print(
        "Counted: FLOPs, balance and bubble of the stages, padded heads, recomputation. By rule of thumb: tensor "
        "parallelism\n(10 % a doubling), small micro-batches. Not counted: your network. Try the first few. "
        "Days: with --gpu, where measured."
    )


def plan_to_json(plan: Plan, gpu: str | None = None) -> dict[str, Any]:
    """The plan as plain data: everything but the configuration, which ``resolved.yaml`` holds."""
    data = {f.name: _plain(getattr(plan, f.name)) for f in dataclasses.fields(plan) if f.name != "config"}
    data["model"] = plan.config.model.name
    data["time"] = [{**_plain(estimate), "days": estimate.days} for estimate in estimate_times(plan, gpu)]
    model = plan.config.model
    data["inference_cache"] = _plain(cache_bytes(model, model.max_position_embeddings))
    data["inference_cache_paper"] = _plain(cache_bytes(model, PAPER_TOKENS, "paper"))
    data["checkpoint"] = _plain(checkpoint_sizes(plan.config, plan.num_parameters, plan.world_size))
    if plan.steps is not None:
        data["num_steps"], data["num_tokens"] = plan.steps.num_steps, plan.steps.num_tokens
    return data


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, range):
        return list(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
