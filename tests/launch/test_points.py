"""Runs of one launch: composed, planned and named one by one."""

from __future__ import annotations

import pytest

from hymba_train.errors import UserError
from launch.cluster import ClusterConfig
from launch.points import make_points, sweep_points

BASE = ["experiment=pretrain_1p5b", "data=demo"]


@pytest.fixture
def points(tmp_path):
    def make(*overrides, sweeps=(), nodes=None, gpus=8, **cluster):
        machine = ClusterConfig(gpus_per_node=gpus, time_limit="01:00:00", **cluster)
        data = ["experiment=demo", f"data.path={tmp_path}", *overrides]
        return make_points(data, sweeps, machine, nodes, None, check_paths=False)

    return make


def problems(make, *args, **kwargs) -> list[str]:
    with pytest.raises(UserError) as error:
        make(*args, **kwargs)
    return list(error.value.problems)


def test_one_run_on_its_nodes(points):
    one = "data.phases.{}.micro_batch_size=1"
    (point,) = points(one.format("stable"), one.format("long"), nodes=2, gpus=2)
    assert (point.num_nodes, point.plan.world_size, point.directory.name) == (2, 4, "demo")
    assert point.directory.is_absolute()


def test_the_layout_says_how_many_nodes(points):
    (point,) = points("parallel=tp2_pp2", gpus=2)
    assert (point.num_nodes, point.plan.world_size) == (2, 4)
    assert "parallel.world_size=4: no multiple of 8 ranks a node" in problems(points, "parallel=tp2_pp2")[0]
    assert "set cluster.processes_per_node=4" in problems(points, "parallel=tp2_pp2")[0]
    assert "cluster.nodes: to be given, or --nodes N" in problems(points, "parallel=dp")[0]
    assert "parallel.world_size=4, but 8 processes run" in problems(points, "parallel=tp2_pp2", nodes=1)[0]


def test_a_sweep_has_a_run_a_point(points):
    found = points(sweeps=["optim.lr=1e-3,2e-3", "run.seed=1,2"], nodes=1, gpus=1)
    assert [p.config.run.name for p in found] == [
        f"demo-lr={lr}-seed={seed}" for lr in ("0.001", "0.002") for seed in (1, 2)
    ]
    assert {p.config.optim.lr for p in found} == {1e-3, 2e-3}


def test_problems_name_their_point(points):
    lines = problems(points, sweeps=["optim.lr=1e-3,fast,-1"], nodes=1, gpus=1)
    assert len(lines) == 2
    assert lines[0].startswith("[optim.lr=fast] optim.lr: expected float")
    assert lines[1].startswith("[optim.lr=-1] optim.lr=-1.0: must be above 0")


def test_points_that_would_share_a_directory(points):
    assert (
        "two points of the sweep would share it" in problems(points, sweeps=["optim.lr=1e-3,0.001"], nodes=1, gpus=1)[0]
    )


def test_points_that_need_different_nodes(points):
    lines = problems(points, sweeps=["parallel=tp2,tp2_pp2"], gpus=2)
    assert lines == ["--sweep: points need [1, 2] nodes; all tasks of an array get as many: give --nodes"]


@pytest.mark.parametrize(
    ("sweeps", "expected"),
    [
        (["a.b=1,2", "a.b=3"], "--sweep a.b: given twice"),
        (["run.name=a,b"], "leave it out"),
        (["run.seed=range(1,4)"], "write the values out"),
        (["~data.phases.long"], "write the values out"),
        (["run.seed"], "cannot be read"),
    ],
)
def test_broken_sweeps(sweeps, expected):
    with pytest.raises(UserError, match=expected):
        sweep_points(sweeps)


def test_suffixes():
    assert sweep_points([]) == [("", [])]
    assert [s for s, _ in sweep_points(["model.global_layers=[0],[0,7]"])] == ["global_layers=0", "global_layers=0_7"]
    names = [s for s, _ in sweep_points(["a.x=1", "b.x=2"])]
    assert names == ["a.x=1-b.x=2"]  # the last parts alone would not tell them apart


@pytest.mark.parametrize("name", ["a b", "../up", "a//b", "/abs", "."])
def test_names_that_are_no_directory(points, name):
    (line,) = problems(points, f"run.name='{name}'", nodes=1, gpus=1)
    assert line.startswith(f"run.name={name}: use letters")


def test_names_two_deep(points):
    (point,) = points("run.name=ablation/no_meta-2", nodes=1, gpus=1)
    assert point.directory.parts[-2:] == ("ablation", "no_meta-2")
