"""``hymba eval``: held-out loss by domain, recall tasks, tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_train.convert.cli import add_model_arguments, load_from
from hymba_train.errors import UserError
from hymba_train.json_lines import finite
from hymba_train.parser import Parser

if TYPE_CHECKING:
    from hymba_train.convert.source import TrainingCheckpoint


def run_eval(argv: list[str]) -> int:
    """The verb; returns the exit code. Raises UserError."""
    parser = Parser(prog="hymba eval", description="held-out loss by domain; recall tasks; tasks of the harness")
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--data", type=Path, metavar="RUN_OR_STEP", help="whose held-out text (default: its own run)")
    parser.add_argument("--data-path", metavar="DIR", help="where that run's data lies now, instead of its data.path")
    parser.add_argument(
        "--recall", nargs="?", const="", metavar="RECIPE", help="instead: the recall tasks of that run, or those of "
        "recipes/evaluation/RECIPE.yaml"
    )  # fmt: skip
    parser.add_argument(
        "--tasks", metavar="LIST", help="instead: paper, paper-comparison, recall, or tasks such as piqa,arc_easy:25"
    )
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="more lm-evaluation-harness task files")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents of a task")
    parser.add_argument("--batch-size", type=int, help="default: the run's micro-batch size; 8 for tasks")
    args = parser.parse_args(argv)
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError("--batch-size: give at least 1")
    if args.tasks and args.recall is not None:
        raise UserError("--recall and --tasks: one at a time")
    results = _tasks(args) if args.tasks else _held_out(args) if args.recall is None else _recall(args)
    if args.json:
        print(json.dumps(finite(results), indent=1))
        return 0
    width = max(map(len, results))
    for name, values in results.items():
        print(f"{name:<{width}}  " + "  ".join(f"{key} {_show(value)}" for key, value in values.items()))
    return 0


def _show(value: Any) -> str:
    return " ".join(f"{v:.3g}" for v in value) if isinstance(value, list) else f"{value:,.6g}"


def _run_of(args: argparse.Namespace) -> TrainingCheckpoint:
    """The training checkpoint whose data and settings count."""
    from hymba_train.convert.published import CONFIG
    from hymba_train.convert.source import TrainingCheckpoint

    if args.data is None and (args.model / CONFIG).is_file():
        raise UserError("--data: an exported directory has no text to evaluate on; name the run whose text to take")
    run = TrainingCheckpoint.find(args.data or args.model)
    if run.phase is None:
        raise UserError(f"{run.path}: this checkpoint was imported and has no data; name a run with --data")
    if args.data_path is not None:
        run.config.data.path = args.data_path
    return run


def _held_out(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    from hymba_train.evaluation.held_out import held_out_losses

    run = _run_of(args)
    losses = held_out_losses(load_from(args).model, run.config, run.phase, batch_size=args.batch_size)
    return {
        domain: {"loss": found.loss, "perplexity": found.perplexity, "tokens": found.num_tokens}
        for domain, found in losses.items()
    }


def _recall(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    from hymba_train.data.build import load_tokenizer
    from hymba_train.evaluation.recall_trial import recall_scores, tasks_of_recipe

    run = _run_of(args)
    evaluation = tasks_of_recipe(args.recall) if args.recall else run.config.evaluation
    if not evaluation.recall:
        raise UserError(
            f"--recall: {run.path} has no evaluation.recall; give a recipe of recipes/evaluation, e.g. recall_512"
        )
    tokenizer = load_tokenizer(run.config.data) if args.tokenizer is None else None
    loaded = load_from(args)
    return recall_scores(
        loaded.model, tokenizer or loaded.require_tokenizer(), evaluation, run.phase, batch_size=args.batch_size
    )


def _tasks(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    from hymba_train.evaluation.harness import parse_tasks, run_tasks

    tasks = parse_tasks(args.tasks)
    size = args.batch_size or 8
    return run_tasks(load_from(args), tasks, batch_size=size, limit=args.limit, include_path=args.include_path)
