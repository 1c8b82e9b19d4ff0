"""Whole runs in one process: resume bit for bit, refuse what cannot be read, and start from other runs' weights.

All runs share one process (``tests.train.tiny_run``).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hymba_train.callbacks.jsonl import read_events
from tests.train.tiny_run import write_data
from tests.warm import server

ROOT = Path(__file__).parents[2]
BF16 = ['precision.params="bf16"', "checkpoint.async_save=true"]
OVERLAP = [f"parallel.{key}=true" for key in ("distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")]
ONE_PHASE = (
    'data.phases={"only":{"tokens":1280,"seq_length":16,"global_batch_size":8,"micro_batch_size":4,'
    '"rampup_batch_size":[4,4,256],"blend":{"odd":1}}}'
)


def start(directory: Path, *runs: list[str], timeout_seconds: int = 240) -> str:
    """Run several runs in one process; returns all its output. Fails if it did not exit with 0."""
    arguments = " then ".join(" ".join(run) for run in runs).split(" ")
    return server().run(0, "tests.train.tiny_run", str(directory), *arguments, timeout_seconds=timeout_seconds)


def run(name: str, *settings: str, load: str | None = None) -> list[str]:
    return [f'run.name="{name}"', *([f'checkpoint.load="{load}"'] if load else []), *settings]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Data, and the runs that the tests look at."""
    path = tmp_path_factory.mktemp("training")
    write_data(path)
    runs = path / "runs"
    start(
        path,
        run("whole", "checkpoint.save_interval=5", "logging.tensorboard=true", 'logging.profile="2:3"'),
        run("halves", "run.train_steps=5", "checkpoint.async_save=true"),
        run("halves"),
        run("bf16", *BF16, "run.deterministic=true"),
        run("bf16_halves", *BF16, "run.train_steps=5"),
        run("bf16_halves", *BF16),
        run("background", "checkpoint.save_interval=5", "checkpoint.async_save=true"),
        run("from_background", load=f"{runs}/background/checkpoints/step_0000005"),
        run("distributed", *OVERLAP, "checkpoint.save_interval=7", load=f"{runs}/whole/checkpoints/step_0000005"),
        run("plain", load=f"{runs}/distributed/checkpoints/step_0000007"),
        run("ramp", ONE_PHASE, "checkpoint.keep_last=2", "checkpoint.save_interval=2"),
        run(
            "weights", ONE_PHASE, "run.train_steps=1", "optim.lr=0", "optim.min_lr=0", "logging.eval_interval=1",
            "checkpoint.load_optimizer=false", load=f"{runs}/ramp",
        ),
        run("other_ramp", ONE_PHASE.replace('"global_batch_size":8', '"global_batch_size":12'), load=f"{runs}/ramp"),
    )  # fmt: skip
    return path


def events(directory: Path, name: str, event: str = "train") -> dict[int, dict]:
    return {r["step"]: r for r in read_events(directory / "runs" / name / "metrics.jsonl", event)}


def exact(directory: Path, name: str, first_step: int = 1) -> list[tuple]:
    """What must be equal bit for bit, step by step."""
    train, held_out = events(directory, name), events(directory, name, "validation")
    return [
        *((s, r["loss_hex"], r["grad_norm_hex"], r["lr"], r["tokens"], r["batch_hash"]) for s, r in train.items()
          if s >= first_step),
        *((s, r["loss_hex"]) for s, r in held_out.items() if s >= first_step),
    ]  # fmt: skip


def step_directory(directory: Path, name: str, step: int) -> Path:
    return directory / "runs" / name / "checkpoints" / f"step_{step:07d}"


def test_it_learns_over_both_phases(directory):
    train = events(directory, "whole")
    assert sorted(train) == list(range(1, 11))
    assert [train[s]["phase"] for s in (4, 5)] == ["short", "long"]
    assert train[10]["tokens"] == 512 + 768 and train[10]["seq_length"] == 32
    held_out = events(directory, "whole", "validation")
    assert sorted(held_out) == [5, 10] and set(held_out[10]["loss"]) == {"odd", "even"}
    assert all(held_out[10]["loss"][d] < held_out[5]["loss"][d] for d in ("odd", "even"))


def test_the_run_directory_holds_everything(directory):
    path = directory / "runs" / "whole"
    names = {p.name for p in path.iterdir()}
    assert {"metrics.jsonl", "loss_curves.png", "tensorboard", "checkpoints", "profile"} <= names
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["latest", "step_0000005", "step_0000010"]
    assert (path / "profile" / "steps_2_3.txt").read_text().count("aten::") > 5
    end = events(directory, "whole", "end")[10]
    assert end["reason"] == "all phases trained"


@pytest.mark.parametrize(("whole", "halves"), [("whole", "halves"), ("bf16", "bf16_halves")])
def test_resume_is_bit_identical(directory, whole, halves):
    assert exact(directory, halves) == exact(directory, whole)
    assert len(events(directory, halves, "start")) == 2, "it was not resumed"


@pytest.mark.parametrize(("whole", "halves"), [("whole", "halves"), ("bf16", "bf16_halves")])
def test_the_final_checkpoints_are_bit_identical(directory, whole, halves, lone_runtime):
    import torch
    from megatron.core import dist_checkpointing

    a, b = (dist_checkpointing.load_plain_tensors(str(step_directory(directory, n, 10))) for n in (whole, halves))
    assert a.keys() == b.keys()
    assert {k.split(".")[2] for k in a if k.startswith("optimizer.")} >= {"exp_avg", "exp_avg_sq"}
    assert {"train_state", "optimizer_step", "rng.cpu"} <= set(a)
    assert [k for k in a if not (torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k])] == []


def test_a_checkpoint_written_in_the_background_is_that_of_its_step(directory):
    """Training goes on while it is written: it must hold step 5, not a later one."""
    assert exact(directory, "from_background", 6) == exact(directory, "whole", 6)
    assert sorted(events(directory, "background", "checkpoint")) == [5, 10]


@pytest.mark.parametrize(("name", "first_step"), [("distributed", 6), ("plain", 8)])
def test_either_optimizer_loads_the_others_checkpoint(directory, name, first_step):
    """Not to the last bit: the two add up the gradient norm in different orders."""
    train, whole = events(directory, name), events(directory, "whole")
    assert sorted(train) == list(range(first_step, 11))
    for step, record in train.items():
        assert record["loss"] == pytest.approx(whole[step]["loss"], rel=1e-6)
        assert record["grad_norm"] == pytest.approx(whole[step]["grad_norm"], rel=1e-5)


def test_the_batch_ramps_up_and_old_checkpoints_go(directory):
    train = events(directory, "ramp")
    assert [train[s]["batch_size"] for s in (1, 4, 5)] == [4, 4, 8]
    kept = sorted(p.name for p in (directory / "runs" / "ramp" / "checkpoints").glob("step_*"))
    assert kept == [f"step_{s:07d}" for s in sorted(train)[-3:] if s % 2 == 0 or s == max(train)][-2:]


def test_weights_only_starts_a_new_run_from_them(directory):
    """With a rate of 0 the held-out loss stays that of the loaded weights."""
    ramp, weights = events(directory, "ramp", "validation"), events(directory, "weights", "validation")
    assert weights[1]["loss_hex"] == ramp[max(ramp)]["loss_hex"]
    assert events(directory, "weights")[1]["tokens"] == 64, "the position was taken over"


def test_a_position_that_no_step_starts_at_is_refused(directory):
    assert not (directory / "runs" / "other_ramp" / "metrics.jsonl").exists()


@pytest.fixture(scope="module")
def damaged(directory) -> str:
    """Copies of a run with damage, each started again; returns the output."""
    runs = directory / "runs"
    for name in ("torn_pointer", "truncated", "all_truncated", "none_complete", "other_model", "missing_tensor"):
        shutil.copytree(runs / "whole", runs / name)
    (runs / "torn_pointer" / "checkpoints" / "latest").write_text("")
    shutil.rmtree(step_directory(directory, "torn_pointer", 10) / ".metadata", ignore_errors=True)
    (step_directory(directory, "torn_pointer", 10) / ".metadata").unlink()
    for name, step in (("truncated", 10), ("all_truncated", 5), ("all_truncated", 10)):
        data = next(step_directory(directory, name, step).glob("*.distcp"))
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    for step in (5, 10):
        (step_directory(directory, "none_complete", step) / "checkpoint.json").unlink()
    (runs / "not_a_run").mkdir()
    return start(
        directory,
        run("torn_pointer"),
        run("truncated"),
        run("all_truncated"),
        run("none_complete"),
        run("other_model", "model.window_size=9"),
        run("missing_tensor", "model.untie_embeddings_and_output_weights=true"),
        run("nowhere", load=str(runs / "not_a_run")),
        run("other_ramp", ONE_PHASE.replace('"global_batch_size":8', '"global_batch_size":12'), load=f"{runs}/ramp"),
    )


def errors(output: str, name: str) -> list[str]:
    return [line for line in output.splitlines() if f"/{name}" in line and "UserError" in line]


def test_a_torn_pointer_falls_back_and_trains_the_same(directory, damaged):
    assert exact(directory, "torn_pointer", 6) == exact(directory, "whole", 6)
    assert "latest is empty: taking the newest complete one, step_0000005" in damaged


def test_a_damaged_checkpoint_is_named_and_the_older_one_taken(directory, damaged):
    assert exact(directory, "truncated", 6) == exact(directory, "whole", 6)
    assert "looking for an older checkpoint than step_0000010" in damaged


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("all_truncated", "no checkpoint can be trusted"),
        ("none_complete", "none is complete"),
        ("other_model", "model.window_size=8, the configuration 9"),
        ("missing_tensor", "model.untie_embeddings_and_output_weights"),
        ("not_a_run", "checkpoint.load="),
    ],
)
def test_what_cannot_be_loaded_is_an_error_not_a_fresh_start(directory, damaged, name, says):
    (line,) = errors(damaged, name)
    assert says in line
    log = directory / "runs" / name / "metrics.jsonl"
    original = directory / "runs" / "whole" / "metrics.jsonl"
    assert not log.exists() or log.read_bytes() == original.read_bytes(), "it trained"


def test_a_changed_ramp_is_named(damaged):
    assert "UserError: data.phases: the checkpoint stands in phase number 0" in damaged
