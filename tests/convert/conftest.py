"""Runs of the tiny model to export, trained in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from hymba_train.callbacks.jsonl import read_events
from tests.convert.plain_venv import make_venv
from tests.train.test_training import run, start
from tests.train.tiny_run import write_data

# Five heads over two ranks, one KV head: padded heads and K/V that every rank holds whole.
UNEVEN = ["model.num_attention_heads=5", "model.hidden_size=40", "model.num_query_groups=1"]


class Runs:
    """``path(name)`` is a run directory, ``held_out(name)`` its last logged held-out losses by domain."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, name: str) -> Path:
        return self.directory / "runs" / name

    def held_out(self, name: str) -> dict[str, float]:
        return read_events(self.path(name) / "metrics.jsonl", "validation")[-1]["loss"]


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    directory = tmp_path_factory.mktemp("tiny_runs")
    write_data(directory)
    start(
        directory,
        run("whole", *UNEVEN, "run.train_steps=6"),  # into the second phase, whose RoPE is another
        run("masked", "data.document_mask=true", "run.train_steps=2", "logging.eval_interval=2"),
        run(
            "bf16", 'precision.params="bf16"', "run.train_steps=2", "logging.eval_interval=2",
            "checkpoint.save_interval=1", "checkpoint.export_interval=1", 'checkpoint.export_dtype="float32"',
        ),
    )  # fmt: skip
    return Runs(directory)


@pytest.fixture(scope="session")
def plain_python(tmp_path_factory) -> Path:
    """python of a virtual environment with transformers and without this package."""
    return make_venv(tmp_path_factory.mktemp("plain_venv"))
