"""``hymba compare``, and its runs as one Slurm job array, as ``hymba launch slurm`` would submit them."""

from __future__ import annotations

from collections.abc import Sequence

from hymba_train.compare.cli import main as compare
from hymba_train.compare.pool import is_finished
from hymba_train.compare.study import Study
from launch.cluster_files import load_cluster
from launch.points import point_of
from launch.slurm import submit_points


def main(argv: Sequence[str]) -> int:
    """``hymba compare``, which a cluster can train as well; returns the exit code. Raises UserError."""
    return compare(argv, submit_study)


def submit_study(study: Study, clusters: Sequence[str], config_dir: str | None) -> int:
    """Submit every run that has not finished; returns the exit code. Raises UserError."""
    name, cluster = load_cluster(clusters, config_dir)
    runs = [run for run in study.runs if not is_finished(run)]
    if not runs:
        print("all runs have finished: leave cluster out, or give --report, for the table")
        return 0
    points = [point_of(run.config, study.name, cluster, None, check_paths=True) for run in runs]
    code = submit_points(points, name, cluster, f"hymba compare {study.name}")
    print("  table and plots   the same command with --report instead of the cluster")
    return code
