"""Sizes of the synthetic recall tasks, and what can be checked of them before a run. Free of torch and numpy."""

from __future__ import annotations

from hymba_train.config.recall_kinds import RECALL_KINDS
from hymba_train.config.schema import Config, RecallTaskConfig

NUM_MARKS = 4
"""Separators that the tasks need: between key and value, after a value, before a question, and the blank."""
FP8_MULTIPLE = 16
SOURCE_KIND = "recall tasks"
"""What the manifest of a source of `hymba data recall` says that it holds."""


def num_questions(kind: str, items: int) -> int:
    """Answers asked for in a sample."""
    return RECALL_KINDS[kind].questions(items)


def shortest(kind: str, items: int) -> int:
    """Tokens that a sample of ``items`` needs at least, the end-of-document token included."""
    return RECALL_KINDS[kind].shortest(items)


def most_items(kind: str, length: int) -> int:
    """The most items that fit a sample of ``length`` tokens; 0 if none does."""
    items = 0
    while shortest(kind, items + 1) <= length:
        items += 1
    return items


def items_of(task: RecallTaskConfig) -> int:
    """Items of a task: what it says, or the usual number for its length."""
    if task.items is not None:
        return task.items
    usual = RECALL_KINDS[task.kind].usual_items(task.length)
    return max(1, min(usual, most_items(task.kind, task.length)))


def check_recall(config: Config) -> list[str]:
    """Problems of evaluation.recall, one line each. Expects values that their keys can take."""
    evaluation, problems = config.evaluation, []
    if not evaluation.recall:
        return []
    needed = evaluation.recall_symbols + NUM_MARKS
    if needed > config.model.vocab_size:
        problems.append(
            f"evaluation.recall_symbols={evaluation.recall_symbols} and {NUM_MARKS} separators are more than "
            f"model.vocab_size={config.model.vocab_size}; set it to at most {config.model.vocab_size - NUM_MARKS}"
        )
    marks = evaluation.recall_separators
    if marks and (len(set(marks)) != NUM_MARKS or len(marks) != NUM_MARKS):
        problems.append(
            f"evaluation.recall_separators={marks}: give {NUM_MARKS} different ids (between key and value, after a "
            "value, before a question, blank), or []"
        )
    for name, task in evaluation.recall.items():
        if config.precision.fp8 and task.length % FP8_MULTIPLE:
            problems.append(
                f"evaluation.recall.{name}.length={task.length} is no multiple of {FP8_MULTIPLE}, which precision.fp8 "
                f"asks of rows; set it to {task.length // FP8_MULTIPLE * FP8_MULTIPLE + FP8_MULTIPLE}"
            )
        problems += _check_task(f"evaluation.recall.{name}", task, evaluation.recall_symbols)
    return problems


def _check_task(key: str, task: RecallTaskConfig, num_symbols: int) -> list[str]:
    fit = most_items(task.kind, task.length)
    if not fit:
        return [f"{key}.length={task.length} is too short for {task.kind}: give at least {shortest(task.kind, 1)}"]
    items = items_of(task)
    if items > fit:
        return [
            f"{key}.items={items} need {shortest(task.kind, items)} tokens, length is {task.length}: "
            f"set items to at most {fit}"
        ]
    if task.kind == "mqar" and items > num_symbols // 2:
        return [
            f"{key}.items={items}: keys are half of evaluation.recall_symbols={num_symbols} and no key comes twice; "
            f"set items to at most {num_symbols // 2}"
        ]
    return []
