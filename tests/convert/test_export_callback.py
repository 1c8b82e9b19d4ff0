"""Exports in the background of a training run."""

from __future__ import annotations

import shutil
import time
from types import SimpleNamespace

import pytest

from hymba_train.callbacks.export import Export
from hymba_train.convert.source import TrainingCheckpoint


class Loop(SimpleNamespace):
    """What the callback looks at."""

    def __init__(self, step=0, finished=True):
        super().__init__(state=SimpleNamespace(step=step), finished=finished)


@pytest.fixture
def checkpoints(runs, tmp_path):
    """Makes published checkpoints of any step number (copies of a real one)."""

    def make(step):
        source = TrainingCheckpoint.find(runs.path("whole")).path
        target = tmp_path / "checkpoints" / f"step_{step:07d}"
        shutil.copytree(source, target)
        return target

    return make


def names(directory):
    return sorted(p.name for p in directory.iterdir())


def test_exports_are_made_while_training_goes_on_and_at_its_end(checkpoints, tmp_path):
    """Interval 10: of checkpoints 4, 12, 16 and 18 that of 12 is due, and the last one at the end. A checkpoint that
    is deleted as soon as it is saved is exported all the same."""
    export, loop = Export(tmp_path / "hf", 10), Loop()
    export.on_train_start(loop)
    for step in (4, 12, 16, 18):
        loop.state.step = step
        path = checkpoints(step)
        before = time.monotonic()
        export.on_checkpoint_saved(loop, path, step)
        export.on_step_end(loop, None)
        assert time.monotonic() - before < 2, "training was held up"
        if step != 18:
            shutil.rmtree(path)
    export.on_train_end(loop)
    export.close()
    logs = {p.name: p.read_text() for p in (tmp_path / "hf").glob("*.log")}
    expected = [f"step_{n:07d}" for n in (12, 18)]
    assert names(tmp_path / "hf") == sorted(expected + [f"{n}.log" for n in expected]), logs
    files = [(tmp_path / "hf" / name / "model.safetensors").read_bytes() for name in expected]
    assert files[0] == files[1]


def test_only_the_last_one_and_none_when_training_was_cut_short(checkpoints, tmp_path):
    for finished, expected in ((False, []), (True, ["step_0000008"])):
        directory = tmp_path / f"hf_{finished}"
        export, loop = Export(directory, 0), Loop(finished=finished)
        export.on_train_start(loop)
        for step in (7, 8):
            path = tmp_path / "checkpoints" / f"step_{step:07d}"
            export.on_checkpoint_saved(loop, path if path.exists() else checkpoints(step), step)
        export.on_train_end(loop)
        export.close()
        found = [n for n in names(directory) if not n.endswith(".log")] if directory.exists() else []
        assert found == expected


def test_a_failed_export_is_reported_and_leaves_training_alone(checkpoints, tmp_path, caplog):
    path = checkpoints(5)
    (path / ".metadata").write_bytes(b"broken")
    export, loop = Export(tmp_path / "hf", 5), Loop(step=4)
    export.on_train_start(loop)
    export.on_checkpoint_saved(loop, path, 5)
    export.on_train_end(loop)
    export.close()
    assert "export of step 5 failed" in caplog.text
    assert "cannot be read as a checkpoint index" in (tmp_path / "hf" / "step_0000005.log").read_text()
    assert names(tmp_path / "hf") == ["step_0000005.log"]


def test_an_exception_ends_the_export_that_is_running(checkpoints, tmp_path):
    export, loop = Export(tmp_path / "hf", 1), Loop()
    export.on_train_start(loop)
    export.on_checkpoint_saved(loop, checkpoints(1), 1)
    process = export._running[0]
    export.close()
    assert process.poll() is not None
    assert names(tmp_path / "hf") == ["step_0000001.log"]
