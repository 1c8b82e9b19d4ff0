"""R14: a checkpoint from a stranger, its manifest rewritten to fit, does not run anything; nor does a configuration.

Code beside weights on the Hugging Face side (auto_map): tests/convert/test_from_hf_refuses.py. Nothing reads archives.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex

from hymba_train.checkpoint import manifest
from hymba_train.checkpoint.index import read_index
from hymba_train.checkpoint.restricted import nothing_runs
from hymba_train.cli import main
from hymba_train.errors import UserError
from tests.train.test_training import run, start

pytestmark = pytest.mark.reliability
COMMON = "common_state/shard_0_1"


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def poison_index(step: Path, canary: Path) -> None:
    (step / ".metadata").write_bytes(pickle.dumps(Payload(canary)))


def poison_index_inside(step: Path, canary: Path) -> None:
    """A true index with the payload where planners keep their data."""
    index = read_index(step)
    index.planner_data = Payload(canary)
    (step / ".metadata").write_bytes(pickle.dumps(index))


def poison_common_state(step: Path, canary: Path) -> None:
    """What is no tensor lies in a data file, which PyTorch loads with weights_only=False."""
    index, content = read_index(step), io.BytesIO()
    torch.save([Payload(canary)], content)
    stored = index.storage_data[MetadataIndex(COMMON)]
    data = step / stored.relative_path
    stored.offset, stored.length = data.stat().st_size, len(content.getvalue())
    data.write_bytes(data.read_bytes() + content.getvalue())
    (step / ".metadata").write_bytes(pickle.dumps(index))


def poison_common_file(step: Path, canary: Path) -> None:
    """Older Megatron-Core's file for what is no tensor; newer ones still read it."""
    torch.save({"train_state": Payload(canary)}, step / "common.pt")


def leave_the_directory(step: Path, canary: Path) -> None:
    index = read_index(step)
    index.storage_data[MetadataIndex(COMMON)].relative_path = "../../secret"
    (step / ".metadata").write_bytes(pickle.dumps(index))


def link_to_elsewhere(step: Path, canary: Path) -> None:
    """A data file that is a link out of the directory: whoever controls its target controls what is loaded."""
    data = next(step.glob("*.distcp"))
    elsewhere = step.parents[1] / f"{step.name}.elsewhere"
    data.rename(elsewhere)
    data.symlink_to(elsewhere)


POISONS = [
    poison_index, poison_index_inside, poison_common_state, poison_common_file, leave_the_directory, link_to_elsewhere,
]  # fmt: skip


@pytest.fixture(scope="module")
def poisoned(finished) -> tuple[Path, str]:
    """(directory with canaries, output) of a start from every poisoned copy, in the environment that is worst."""
    for poison in POISONS:
        copy = finished / "runs" / poison.__name__
        shutil.copytree(finished / "runs" / "whole", copy)
        for step in copy.glob("checkpoints/step_*"):
            poison(step, finished / f"canary_{poison.__name__}")
            manifest.write(step, manifest.make(step))
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        return finished, start(finished, *(run(poison.__name__) for poison in POISONS))
    finally:
        del os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"]


@pytest.mark.parametrize("poison", POISONS)
def test_it_is_refused_in_one_line_and_nothing_has_run(poisoned, poison):
    path, output = poisoned
    assert not (path / f"canary_{poison.__name__}").exists()
    lines = [li for li in output.splitlines() if f"/{poison.__name__}/" in li]
    assert len([li for li in lines if "UserError" in li]) == 1
    assert any("step_0000010" in li and ("cannot be" in li or "is a link" in li) for li in lines)


def test_without_the_guard_they_do_run(checkpoints, tmp_path, lone_runtime):
    """The poisons are real, so the tests above can fail."""
    step = checkpoints / "step_0000010"
    shutil.copytree(step, clean := tmp_path / "clean")
    poison_common_state(step, tmp_path / "in_common_state")
    with nothing_runs(), pytest.raises(BaseException):  # noqa: B017  PyTorch's exception is no Exception
        dist_checkpointing.load_common_state_dict(str(step))
    assert not (tmp_path / "in_common_state").exists()
    dist_checkpointing.load_common_state_dict(str(step))
    assert (tmp_path / "in_common_state").exists()

    poison_index(clean, tmp_path / "in_index")
    with nothing_runs(), pytest.raises(UserError):
        FileSystemReader(clean).read_metadata()
    assert not (tmp_path / "in_index").exists()
    with pytest.raises(AttributeError):
        FileSystemReader(clean).read_metadata()
    assert (tmp_path / "in_index").exists()


YAML = {
    "tag": "model: !!python/object/apply:os.mkdir ['{canary}']\n",
    "new": "run: !!python/object/new:os.mkdir ['{canary}']\n",
    "target": "run:\n  _target_: os.mkdir\n  _args_: ['{canary}']\n",
    "target_in_phase": "data:\n  phases:\n    x:\n      _target_: os.mkdir\n      path: '{canary}'\n",
}


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "recipe"])
@pytest.mark.parametrize("name", YAML)
def test_a_configuration_runs_nothing(tmp_path, capsys, name, frozen):
    canary, content = tmp_path / "canary", YAML[name].format(canary=tmp_path / "canary")
    if frozen:
        (tmp_path / "resolved.yaml").write_text(content)
        arguments = ["--frozen", str(tmp_path / "resolved.yaml")]
    else:
        (tmp_path / "experiment").mkdir()
        (tmp_path / "experiment" / "evil.yaml").write_text("# @package _global_\n" + content)
        arguments = ["experiment=evil", "model=hymba_tiny", "--config-dir", str(tmp_path)]
    assert main(["plan", *arguments]) == 2
    assert "not plain YAML" in (error := capsys.readouterr().err) or "_target_" in error, error
    assert not canary.exists()


def test_an_unguarded_loader_would_run_it(tmp_path):
    """Control."""
    yaml.unsafe_load(YAML["tag"].format(canary=tmp_path / "canary"))
    assert (tmp_path / "canary").exists()
