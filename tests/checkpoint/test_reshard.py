"""A checkpoint of one layout resumes under others: the steps after it are those of the uninterrupted run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.test_training import events, exact, run, step_directory
from tests.train.tiny_run import write_data
from tests.warm import server

OVERLAP = [f"parallel.{key}=true" for key in ("distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")]
SAVED_BY = ["parallel.tensor=2"]
# name: (run and step that it loads, settings)
LAYOUTS = {
    "tp2_sp": ("saved", 5, ["parallel.tensor=2", "parallel.sequence=true"]),
    "dp2_distributed": ("saved", 5, [*OVERLAP, "checkpoint.save_interval=7", "checkpoint.async_save=true"]),
    "pp2_vpp2": ("dp2_distributed", 7, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
}

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reshard")
    write_data(path)
    runs = [
        run("saved", *SAVED_BY, "checkpoint.save_interval=5", "checkpoint.async_save=true"),
        run("same_layout", *SAVED_BY, load=str(step_directory(path, "saved", 5))),
    ]
    for name, (source, step, settings) in LAYOUTS.items():
        runs.append(run(name, *settings, load=str(step_directory(path, source, step))))
    arguments = " then ".join(" ".join(r) for r in runs).split(" ")
    server().run(2, "tests.train.tiny_run", str(path), *arguments, timeout_seconds=280)
    return path


def test_the_same_layout_is_bit_identical(directory):
    assert exact(directory, "same_layout") == exact(directory, "saved", 6)
    assert min(events(directory, "same_layout")) == 6


@pytest.mark.parametrize("name", LAYOUTS)
def test_another_layout_trains_the_same(directory, name):
    resumed, saved = events(directory, name), events(directory, "saved")
    assert sorted(resumed) == list(range(LAYOUTS[name][1] + 1, 11))
    for step, record in resumed.items():
        assert record["batch_hash"] == saved[step]["batch_hash"]
        assert record["loss"] == pytest.approx(saved[step]["loss"], rel=1e-6)
        assert record["grad_norm"] == pytest.approx(saved[step]["grad_norm"], rel=1e-4)
    held_out = events(directory, name, "validation")[10]["loss"]
    assert held_out == pytest.approx(events(directory, "saved", "validation")[10]["loss"], rel=1e-5)
