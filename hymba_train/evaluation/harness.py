"""Tasks of lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hymba_train.convert.load import LoadedModel
from hymba_train.errors import UserError

PAPER_TASKS = {
    "mmlu": 5, "arc_easy": 0, "arc_challenge": 0, "piqa": 0, "winogrande": 0, "hellaswag": 0, "squad_completion": 1,
}  # fmt: skip
"""Tasks of the paper's table of base models by lm-evaluation-harness's names, and their number of examples (MMLU,
ARC-e, ARC-c, PIQA, Winogrande, HellaSwag, SQuAD-C)."""

COMPARISON_TASKS = {
    "wikitext": 0, "lambada_openai": 0, "swde": 0, "squad_completion": 0, "piqa": 0, "arc_challenge": 0, "arc_easy": 0,
    "hellaswag": 0, "winogrande": 0, "truthfulqa_mc2": 0, "social_iqa": 0,
}  # fmt: skip
"""Tasks of the paper's comparisons under the same settings (Wiki and LMB perplexity, SWDE, SQuAD-C, Lambada and the
seven others), all zero-shot. Which of the harness's variants of LAMBADA and TruthfulQA was taken is not stated."""

RECALL_TASKS = {"swde": 0, "squad_completion": 0, "fda": 0}
"""Recall from real text: SWDE and SQuAD-C of the paper, and FDA of the same family."""

TASK_LISTS = {"paper": PAPER_TASKS, "paper-comparison": COMPARISON_TASKS, "recall": RECALL_TASKS}


def parse_tasks(text: str) -> dict[str, int]:
    """Tasks and their number of examples: names of TASK_LISTS, or of tasks as in ``piqa,arc_easy:25`` (without a number
    the paper's, or 0). Raises UserError.

    >>> parse_tasks("piqa,squad_completion,arc_easy:25")
    {'piqa': 0, 'squad_completion': 1, 'arc_easy': 25}
    """
    tasks: dict[str, int] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = entry.partition(":")
        if number and not number.isdigit():
            raise UserError(f"--tasks: {entry!r}: give a task, or task:examples")
        if name in TASK_LISTS:
            tasks |= TASK_LISTS[name]
        else:
            tasks[name] = int(number) if number else PAPER_TASKS.get(name, 0)
    if not tasks:
        raise UserError(f"--tasks: give one of {', '.join(TASK_LISTS)}, or names of lm-evaluation-harness tasks")
    return tasks


def run_tasks(
    loaded: LoadedModel, tasks: dict[str, int], *, batch_size: int = 8, limit: int | None = None,
    include_path: Path | None = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Task -> metric -> value, by lm-evaluation-harness's hf backend.

    Without network access give ``include_path``, a directory with task files whose data lie on the disk, or have the
    data in the Hub's cache and HF_HUB_OFFLINE=1 set. Raises UserError if the package, a task or its data is not there.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks: lm-evaluation-harness is not installed: pip install 'hymba-train[eval]'")
    try:  # its hf backend needs packages of its own, which it comes without by itself
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"--tasks: lm-evaluation-harness lacks a package ({error}): pip install 'hymba-train[eval]'"
        ) from error

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    known = set(manager.all_tasks)
    unknown = [name for name in tasks if name not in known]
    if unknown:
        raise UserError(*(f"--tasks: lm-evaluation-harness has no task {name!r}" for name in unknown))
    tokenizer = loaded.transformers_tokenizer()
    longest = loaded.model.config.max_position_embeddings
    backend = HFLM(pretrained=loaded.model, tokenizer=tokenizer, batch_size=batch_size, max_length=longest)
    results: dict[str, dict[str, float]] = {}
    for examples in sorted(set(tasks.values())):
        names = [name for name, number in tasks.items() if number == examples]
        try:
            found = simple_evaluate(
                model=backend, tasks=names, num_fewshot=examples, limit=limit, task_manager=manager, log_samples=False
            )
        except OSError as error:  # what datasets raises when the Hub cannot be reached is one, too
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(
                f"--tasks: the data of {', '.join(names)} cannot be had ({reason}); without network access give "
                "--include-path, or fill the Hub's cache and set HF_HUB_OFFLINE=1"
            ) from error
        for name in names:
            values = found.get("groups", {}).get(name) or found["results"][name]
            results[name] = {k.removesuffix(",none"): v for k, v in values.items() if isinstance(v, float)}
    return {name: results[name] for name in tasks}
