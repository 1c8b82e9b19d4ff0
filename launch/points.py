"""The runs of one launch: one, or one a point of a sweep. Each is composed, planned and checked on its own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hymba_train.config import Config, compose, run_directory
from hymba_train.errors import UserError
from hymba_train.plan import Plan, make_plan
from launch.cluster import ClusterConfig


@dataclass(frozen=True)
class Point:
    """One run."""

    config: Config
    plan: Plan
    num_nodes: int
    base_name: str  # run.name without what the sweep adds

    @property
    def directory(self) -> Path:
        """Run directory, absolute."""
        return run_directory(self.config).absolute()


def make_points(
    overrides: Sequence[str], sweeps: Sequence[str], cluster: ClusterConfig, num_nodes: int | None,
    config_dir: str | None, check_paths: bool,
) -> list[Point]:  # fmt: skip
    """Compose and plan every run of a launch on ``cluster``; ``num_nodes`` None: what the cluster or the layout says.

    Raises UserError with the problems of all points.
    """
    points, problems = [], []
    for suffix, changes in sweep_points(sweeps):
        try:
            points.append(_point([*overrides, *changes], suffix, cluster, num_nodes, config_dir, check_paths))
        except UserError as error:
            problems += [f"[{' '.join(changes)}] {line}" if changes else line for line in error.problems]
    if not problems:
        problems = _disagreements(points)
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return points


def _point(overrides, suffix, cluster, num_nodes, config_dir, check_paths) -> Point:
    config = compose(overrides, config_dir=config_dir)
    base_name = config.run.name
    if suffix:  # composed again, because other keys may be made from the name
        config = compose([*overrides, f"run.name='{config.run.name}-{suffix}'"], config_dir=config_dir)
    return point_of(config, base_name, cluster, num_nodes, check_paths)


def point_of(config: Config, base_name: str, cluster: ClusterConfig, num_nodes: int | None, check_paths: bool) -> Point:
    """A composed run as it will be started on ``cluster``, checked. Raises UserError."""
    nodes = num_nodes or cluster.nodes or _nodes_of_layout(config, cluster)
    plan = make_plan(config, nodes * cluster.ranks_per_node, check_paths=check_paths)
    plan.require_complete()
    return Point(config, plan, nodes, base_name)


def _nodes_of_layout(config: Config, cluster: ClusterConfig) -> int:
    world_size, ranks = config.parallel.world_size, cluster.ranks_per_node
    if world_size is None:
        raise UserError("cluster.nodes: to be given, or --nodes N: neither the cluster nor the layout says how many")
    if world_size % ranks:
        raise UserError(
            f"parallel.world_size={world_size}: no multiple of {ranks} ranks a node; "
            f"set cluster.processes_per_node={world_size if world_size < ranks else 1}, or choose another layout"
        )
    return world_size // ranks


def _disagreements(points: list[Point]) -> list[str]:
    nodes = {point.num_nodes for point in points}
    directories = [point.directory for point in points]
    twice = sorted({str(d) for d in directories if directories.count(d) > 1})
    problems = [f"{d}: two points of the sweep would share it; sweep over keys that differ" for d in twice]
    if len(nodes) > 1:
        problems.append(f"--sweep: points need {sorted(nodes)} nodes; all tasks of an array get as many: give --nodes")
    return problems


def sweep_points(sweeps: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(suffix of the run's name, overrides) of every combination; one pair of nothing without a sweep.

    >>> sweep_points(["optim.lr=1e-3,2e-3", "run.seed=1"])
    [('lr=0.001-seed=1', ['optim.lr=0.001', 'run.seed=1']), ('lr=0.002-seed=1', ['optim.lr=0.002', 'run.seed=1'])]
    """
    keys: list[str] = []
    values: list[list[str]] = []
    for text in sweeps:
        key, options = _parse(text)
        if key in keys:
            raise UserError(f"--sweep {key}: given twice; write all values after one: {key}=A,B,C")
        if key == "run.name":
            raise UserError("--sweep run.name: every point gets a name of its own already; leave it out")
        keys.append(key)
        values.append(options)
    leaves = [key.rpartition(".")[2] for key in keys]
    names = [leaf if leaves.count(leaf) == 1 else key for leaf, key in zip(leaves, keys, strict=True)]
    points = []
    for chosen in itertools.product(*values):
        suffix = "-".join(f"{name}={_slug(value)}" for name, value in zip(names, chosen, strict=True))
        points.append((suffix, [f"{key}={value}" for key, value in zip(keys, chosen, strict=True)]))
    return points


def _slug(value: str) -> str:
    return re.sub(r"[^\w.+=-]+", "_", value).strip("_")


def _parse(text: str) -> tuple[str, list[str]]:
    """(key, values) of ``key=a,b``; commas within brackets, braces and quotes belong to a value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise UserError(f"--sweep {text!r}: cannot be read; write KEY=A,B, e.g. optim.lr=1e-3,2e-3") from error
    if parsed.is_delete() or (parsed.is_sweep_override() and not parsed.is_choice_sweep()):
        raise UserError(f"--sweep {text!r}: write the values out: KEY=A,B,C")
    if parsed.is_sweep_override():
        return parsed.key_or_group, list(parsed.sweep_string_iterator())
    return parsed.key_or_group, [text.partition("=")[2]]
