"""Exports in the background of a training run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from hymba_train.callbacks import export as exports
from hymba_train.callbacks.export import Export
from hymba_train.checkpoint.directory import complete_steps
from hymba_train.convert.source import TrainingCheckpoint
from hymba_train.convert.to_hf import export_hf


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
    export, loop = Export(tmp_path / "hf", 10, checkpoints=tmp_path / "checkpoints"), Loop()
    export.on_train_start(loop)
    for step in (4, 12, 16, 18):
        loop.state.step = step
        path = checkpoints(step)
        export.on_checkpoint_saved(loop, path, step)
        if step == 12:
            assert export._running[0].poll() is None, "training was held up until the export was done"
        export.on_step_end(loop, None)
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
        export, loop = Export(directory, 0, checkpoints=tmp_path / "checkpoints"), Loop(finished=finished)
        export.on_train_start(loop)
        for step in (7, 8):
            path = tmp_path / "checkpoints" / f"step_{step:07d}"
            export.on_checkpoint_saved(loop, path if path.exists() else checkpoints(step), step)
        export.on_train_end(loop)
        export.close()
        found = [n for n in names(directory) if not n.endswith(".log")] if directory.exists() else []
        assert found == expected


def test_a_run_exports_as_its_configuration_says(runs, tmp_path):
    """checkpoint.export_interval=1 and export_dtype, in a real run of 2 steps: what to-hf writes of each checkpoint."""
    found = runs.path("bf16") / "hf"
    assert names(found) == ["step_0000001", "step_0000001.log", "step_0000002", "step_0000002.log"]
    for step in complete_steps(runs.path("bf16") / "checkpoints"):
        again = export_hf(step, tmp_path / step.name, dtype="float32")
        for file in again.iterdir():
            assert (found / step.name / file.name).read_bytes() == file.read_bytes(), file.name
    assert not (runs.path("whole") / "hf").exists()


def test_an_end_whose_export_was_lost_is_exported_by_the_next_start(checkpoints, tmp_path):
    """It finds nothing to train, and exports what is not exported yet; what it trains itself it exports anew."""
    checkpoints(7)
    for write in (True, False):
        export, loop = Export(tmp_path / "hf", 0, checkpoints=tmp_path / "checkpoints"), Loop(step=7)
        export.on_train_start(loop)
        export.on_train_end(loop)
        export.close()
        assert names(tmp_path / "hf") == ["step_0000007", "step_0000007.log"]
        mark = tmp_path / "hf" / "step_0000007" / "mark"
        assert mark.exists() != write
        mark.touch()
    export.on_checkpoint_saved(loop, tmp_path / "checkpoints" / "step_0000007", 7)
    export.on_train_end(loop)
    assert not mark.exists()


def test_a_checkpoint_that_is_gone_before_it_can_be_held_is_reported(checkpoints, tmp_path, caplog):
    export, loop = Export(tmp_path / "hf", 1, checkpoints=tmp_path / "checkpoints"), Loop()
    export.on_train_start(loop)
    export.on_checkpoint_saved(loop, tmp_path / "checkpoints" / "step_0000001", 1)
    assert "step 1 is not exported" in caplog.text
    export.on_checkpoint_saved(loop, checkpoints(2), 2)
    export.on_train_end(loop)
    export.close()
    assert names(tmp_path / "hf") == ["step_0000002", "step_0000002.log"]


def test_a_failed_export_is_reported_and_leaves_training_alone(checkpoints, tmp_path, caplog):
    path = checkpoints(5)
    (path / ".metadata").write_bytes(b"broken")
    export, loop = Export(tmp_path / "hf", 5, checkpoints=tmp_path / "checkpoints"), Loop(step=4)
    export.on_train_start(loop)
    export.on_checkpoint_saved(loop, path, 5)
    export.on_train_end(loop)
    export.close()
    assert "export of step 5 failed" in caplog.text
    assert ".metadata: has 6 bytes" in (tmp_path / "hf" / "step_0000005.log").read_text()
    assert names(tmp_path / "hf") == ["step_0000005.log"]


@pytest.mark.parametrize(("loaded", "exported", "made"), [(12, 8, True), (12, 10, False), (8, 4, False)])
def test_an_export_that_the_process_before_has_lost_is_made_up_for(checkpoints, tmp_path, loaded, exported, made):
    """Interval 10: at 12 one was due since 10, at 8 none."""
    checkpoints(loaded)
    (tmp_path / "hf" / f"step_{exported:07d}").mkdir(parents=True)
    export, loop = Export(tmp_path / "hf", 10, checkpoints=tmp_path / "checkpoints"), Loop(step=loaded, finished=False)
    export.on_train_start(loop)
    assert (export._running is not None) == made
    if made:
        export._wait()
        export.on_step_end(loop, None)
    export.close()
    assert (tmp_path / "hf" / f"step_{loaded:07d}" / "config.json").exists() == made


def test_the_wait_of_the_end_is_no_hang(checkpoints, tmp_path, monkeypatch):
    """The watchdog is told all the while."""
    monkeypatch.setattr(exports, "SECONDS_BETWEEN_TOUCHES", 0.01)
    touched = []
    export = Export(tmp_path / "hf", 0, checkpoints=tmp_path / "checkpoints", touch=lambda: touched.append(1))
    checkpoints(3)
    export.on_train_start(Loop(step=3))
    export.on_train_end(Loop(step=3))
    assert len(touched) > 3 and (tmp_path / "hf" / "step_0000003").is_dir()


def test_an_export_does_not_outlive_a_killed_rank(checkpoints, tmp_path):
    path = checkpoints(1)
    code = f"""
import os, signal
from pathlib import Path
from types import SimpleNamespace
from hymba_train.callbacks.export import Export
loop = SimpleNamespace(state=SimpleNamespace(step=0), finished=False)
export = Export(Path({str(tmp_path / "hf")!r}), 1, checkpoints=Path({str(path.parent)!r}))
export.on_train_start(loop)
export.on_checkpoint_saved(loop, Path({str(path)!r}), 1)
print(export._running[0].pid, flush=True)
signal.pause()
"""
    rank = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ)
    pid = int(rank.stdout.readline())
    child = psutil.Process(pid)
    rank.send_signal(signal.SIGKILL)
    rank.wait()
    rank.stdout.close()
    psutil.wait_procs([child], timeout=120)
    assert not (tmp_path / "hf" / "step_0000001").exists(), "it went on, and ended its work"


def test_an_exception_ends_the_export_that_is_running(checkpoints, tmp_path):
    export, loop = Export(tmp_path / "hf", 1, checkpoints=tmp_path / "checkpoints"), Loop()
    export.on_train_start(loop)
    export.on_checkpoint_saved(loop, checkpoints(1), 1)
    process = export._running[0]
    export.close()
    assert process.poll() is not None
    assert names(tmp_path / "hf") == ["step_0000001.log"]
