"""Clusters without a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from hymba_train.config import compose
from launch.cluster_files import load_cluster
from launch.script import Job

HERE = Path(__file__).parent


@pytest.fixture
def job_of():
    """job_of("slurm_venv", "cluster.partition=h100", ...) -> a Job of the 1.5B recipe with fixed paths."""

    def make(cluster: str, *overrides: str, num_nodes: int | None = None, points: int = 1) -> Job:
        name, loaded = load_cluster([f"cluster={cluster}", *overrides])
        config = compose(["experiment=pretrain_1p5b"])
        base = Path("/shared/me/runs") / config.run.name
        directories = (base,) if points == 1 else tuple(Path(f"{base}-lr={i}") for i in range(points))
        return Job(
            name=config.run.name, cluster_name=name, cluster=loaded, num_nodes=num_nodes or loaded.nodes or 1,
            run_directories=directories, launch="0001",
            directory=base / "slurm" / "0001" if points == 1 else Path(f"{base}.sweep/0001"),
            working_directory=Path("/shared/me"),
            command=f"hymba launch slurm experiment=pretrain_1p5b cluster={cluster}",
        )  # fmt: skip

    return make
