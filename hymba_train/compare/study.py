"""A comparison as a list of runs: composed, cut to the budget, and checked before anything starts. Free of torch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hymba_train.compare.members import Budget, Member
from hymba_train.config import FROZEN_NAME, compose, load_frozen, run_directory
from hymba_train.config.freeze import changed_keys
from hymba_train.config.schema import TO_BE_GIVEN, Config
from hymba_train.config.typed import flatten, to_plain
from hymba_train.describe import model_tensors, training_flops
from hymba_train.errors import UserError
from hymba_train.plan import make_plan

MOST_SPREAD = 0.03
"""Largest difference of parameter counts within a comparison, as a share of the smallest."""
MAY_CHANGE = (
    "logging.tensorboard",
    "logging.wandb",
    "logging.profile",
    "checkpoint.save_interval",
    "checkpoint.keep_",
    "guards.",
)
"""Beginnings of keys that do not change what a run learns."""
MUST_AGREE = ("data.", "schedule.", "evaluation.", "run.deterministic", "run.train_steps")
"""Beginnings of keys that all members share; those of data.phases.NAME.tokens may differ where the budget is FLOPs."""


@dataclass(frozen=True, eq=False)
class Run:
    """One member with one seed."""

    member: str
    seed: int  # 1 is the first
    config: Config

    @property
    def name(self) -> str:
        return self.config.run.name

    @property
    def directory(self) -> Path:
        return run_directory(self.config)


@dataclass(frozen=True)
class Study:
    """``runs`` in the order in which they start: all members with the first seed, then with the second, ..."""

    name: str
    directory: Path  # holds a directory for each run, the table and the plots
    members: tuple[str, ...]
    num_seeds: int
    runs: tuple[Run, ...]

    def of(self, member: str) -> list[Run]:
        return [run for run in self.runs if run.member == member]

    def config(self, member: str) -> Config:
        return self.of(member)[0].config


def make_study(
    members: Sequence[Member], overrides: Sequence[str], *, num_seeds: int, budget: Budget | None,
    config_dir: str | None = None, any_size: bool = False, check_paths: bool = True,
) -> Study:  # fmt: skip
    """Compose, plan and check every run. Raises UserError with the problems of all members.

    Seed k of every member is run.seed + k - 1, so the members see the same data in the same order.
    """
    configs: dict[str, Config] = {}
    problems: list[str] = []
    for member in members:
        try:
            config = compose([*overrides, *member.overrides, "logging.batch_hash=true"], config_dir=config_dir)
            if budget is not None:
                cut_to(config, budget)
            make_plan(config, check_paths=check_paths and not problems).require_complete()
            configs[member.name] = config
        except UserError as error:
            problems += [f"{member.name}: {line}" for line in error.problems]
    if not problems:
        problems = _disagreements(configs, budget)
        problems += [] if any_size else _sizes(configs)
    if problems:
        raise UserError(*dict.fromkeys(problems))
    first = next(iter(configs.values()))
    study = Study(
        first.run.name, run_directory(first), tuple(configs), num_seeds,
        tuple(_run(name, seed, config) for seed in range(1, num_seeds + 1) for name, config in configs.items()),
    )  # fmt: skip
    changed = [line for run in study.runs for line in _changes(run)]
    if changed:
        raise UserError(
            *changed[:8],
            f"{study.directory}: holds runs with other settings, which this comparison may not be mixed with: choose "
            "another run.name, or take the old settings",
        )
    return study


def _run(member: str, seed: int, config: Config) -> Run:
    config = copy.deepcopy(config)
    config.run.directory = str(run_directory(config))
    config.run.name = f"{member}-seed{seed}"
    config.run.seed += seed - 1
    return Run(member, seed, config)


def cut_to(config: Config, budget: Budget) -> None:
    """Set the tokens of all phases, in their proportions and in whole steps, to a budget. Changes ``config``.
    Raises UserError: no phase has tokens."""
    phases = config.data.phases
    if not phases or any(phase.tokens == TO_BE_GIVEN for phase in phases.values()):
        raise UserError("budget: the experiment has no phases to cut; choose one that has, or give their tokens")
    total = sum(phase.tokens for phase in phases.values())
    tokens = budget.amount
    if budget.in_flops:
        tokens /= sum(
            phase.tokens / total * training_flops(config.model, phase.seq_length) for phase in phases.values()
        )
    for phase in phases.values():
        of_step = phase.seq_length * phase.global_batch_size
        phase.tokens = max(1, round(tokens * phase.tokens / total / of_step)) * of_step


def num_parameters(config: Config) -> int:
    return sum(t.num_parameters for t in model_tensors(config.model))


def flops_at(config: Config, tokens: int) -> float:
    """Training FLOPs of the first ``tokens`` of a run."""
    done = 0.0
    for phase in config.data.phases.values():
        part = min(tokens, phase.tokens)
        done += part * training_flops(config.model, phase.seq_length)
        tokens -= part
    return done


def _disagreements(configs: dict[str, Config], budget: Budget | None) -> list[str]:
    """Settings by which a comparison would compare more than the models."""
    by_flops = budget is not None and budget.in_flops
    plain = {name: flatten(to_plain(config)) for name, config in configs.items()}
    problems = []
    first, *others = plain
    for other in others:
        for key in sorted({*plain[first], *plain[other]}):
            if not key.startswith(MUST_AGREE) or (by_flops and key.endswith(".tokens")):
                continue
            a, b = plain[first].get(key), plain[other].get(key)
            if a != b:
                problems.append(
                    f"{key}: {first} has {a}, {other} has {b}; members of a comparison share data and schedule"
                )
    for key in ("run.name", "run.directory", "run.seed"):
        if len({str(values[key]) for values in plain.values()}) > 1:
            problems.append(f"{key}: differs between members; leave it out of --member")
    return problems


def _sizes(configs: dict[str, Config]) -> list[str]:
    counts = {name: num_parameters(config) for name, config in configs.items()}
    small, large = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    spread = counts[large] / counts[small] - 1
    if spread <= MOST_SPREAD:
        return []
    each = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return [
        f"parameters: {large} has {spread:.1%} more than {small}, {MOST_SPREAD:.0%} is the most ({each}); change a "
        "size, or compare them all the same with --any-size"
    ]


def _changes(run: Run) -> list[str]:
    path = run.directory / FROZEN_NAME
    if not path.is_file():
        return []
    lines = changed_keys(load_frozen(path), run.config)
    return [f"{run.name}: {line}" for line in lines if not line.startswith(MAY_CHANGE)]
