"""The table of a comparison, as Markdown and as JSON. Free of torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hymba_train.callbacks.progress import format_count
from hymba_train.compare.results import CACHE_TOKENS, DataCheck, Difference, MemberResult, mean_and_spread
from hymba_train.compare.study import Study
from hymba_train.files import write_atomically

MEASURES = {"mean_recall": "recall", "mean_held_out": "held-out loss"}


def table_lines(
    study: Study, members: Sequence[MemberResult], differences: Sequence[Difference], check: DataCheck, num_jobs: int
) -> list[str]:
    """Markdown."""
    done = sum(len(member.finished) for member in members)
    lines = [f"# {study.name}: {', '.join(study.members)}", ""]
    lines += [f"{done} of {len(study.runs)} runs finished. Mean ± standard deviation over the finished seeds.", ""]
    lines += _summary(members)
    for title, attribute, form in (
        ("Recall: accuracy by task", "recall", "{:.1%}"),
        ("Held-out loss by domain (nats per token)", "held_out", "{:.4f}"),
    ):
        names = list(dict.fromkeys(name for m in members for run in m.finished for name in getattr(run, attribute)))
        if names:
            lines += ["", f"## {title}", "", _row(["model", *names]), _row(["---", *["---:"] * len(names)])]
            for m in members:
                found = [getattr(run, attribute) for run in m.finished]
                values = [[scores[name] for scores in found if name in scores] for name in names]
                lines.append(_row([m.name, *(_pm(v, form) for v in values)]))
    if differences:
        lines += ["", "## Differences, paired by seed", ""]
        lines += [_row(["pair", "measure", "difference", "95 %", "seeds", ""]), _row(["---"] * 6)]
        lines += [_row(_difference(d)) for d in differences]
    lines += ["", "## Notes", ""]
    lines += [f"- {line}" for line in _notes(members, check, num_jobs)]
    return lines


def _summary(members: Sequence[MemberResult]) -> list[str]:
    head = [
        "model", "parameters", f"cache at {CACHE_TOKENS:,}", "tokens", "FLOPs", "recall", "held-out loss", "perplexity",
        "tokens/s", "seeds",
    ]  # fmt: skip
    lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    for m in members:
        losses = m.values("mean_held_out")
        perplexities = [math.exp(min(loss, 700)) for loss in losses]
        lines.append(
            _row([
                m.name, format_count(m.num_parameters), f"{m.cache_bytes / 1e6:.2f} MB", format_count(m.tokens),
                f"{m.flops:.2e}", _pm(m.values("mean_recall"), "{:.1%}"), _pm(losses, "{:.4f}"),
                _pm(perplexities, "{:.2f}"), _pm(m.values("tokens_per_second"), "{:,.0f}"),
                f"{len(m.finished)}/{len(m.runs)}",
            ])
        )  # fmt: skip
    return lines


def _difference(d: Difference) -> list[str]:
    form = "{:+.1%}" if d.measure == "mean_recall" else "{:+.4f}"
    width = "-" if d.half_width is None else "±" + form.format(d.half_width).lstrip("+")
    verdict = "one seed" if d.half_width is None else "resolved" if d.is_resolved else "not resolved"
    pair = f"{d.other} - {d.reference}"
    return [pair, MEASURES[d.measure], form.format(d.mean), width, str(d.num_seeds), verdict]


def _notes(members: Sequence[MemberResult], check: DataCheck, num_jobs: int) -> list[str]:
    notes = ["Recall and held-out loss are means over the tasks and domains below; perplexity is of the mean loss."]
    if check.problems:
        notes += [f"DATA DIFFER: {problem}" for problem in check.problems]
    else:
        notes.append(
            f"Data and order: {check.num_compared} hashes of batches compared between members of one seed, all equal."
            if check.num_compared
            else "Data and order: nothing to compare yet."
        )
    shared = f", while up to {num_jobs} runs shared the device" if num_jobs > 1 else ""
    notes.append(
        f"tokens/s: as trained{shared}. Cache: keys and values in bf16, SSM state in float32, of one sequence of "
        f"{CACHE_TOKENS:,} tokens."
    )
    finished = [run for m in members for run in m.finished]
    for m in members:
        notes += [f"{m.name} seed {run.seed}: {run.state}" for run in m.runs if not run.is_finished]
        for measure, what in MEASURES.items():
            if any(getattr(run, measure) is not None for run in finished):
                notes += [
                    f"{m.name} seed {run.seed}: finished, but its metrics.jsonl has no {what}: not in those means"
                    for run in m.finished
                    if getattr(run, measure) is None
                ]
    return notes


def _pm(values: Sequence[float], form: str) -> str:
    found = mean_and_spread(values)
    if found is None:
        return "-"
    return form.format(found[0]) + (f" ± {form.format(found[1])}" if len(values) > 1 else "")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def as_json(study: Study, members: Sequence[MemberResult], differences: Sequence[Difference], check: DataCheck) -> Any:
    """Everything in the table and the curves, as plain data; NaN is null."""
    return _plain({
        "name": study.name,
        "cache_tokens": CACHE_TOKENS,
        "members": [{**asdict(m), "finished": len(m.finished)} for m in members],
        "differences": [{**asdict(d), "resolved": d.is_resolved} for d in differences],
        "data": asdict(check),
    })  # fmt: skip


def write_report(path: Path, lines: Sequence[str], data: Any) -> None:
    """``path``/table.md and table.json."""
    write_atomically(path / "table.md", "\n".join(lines) + "\n")
    write_atomically(path / "table.json", json.dumps(data, indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
