"""R10: bad steps are never applied, their cause is found, and what follows is what the configuration says."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from megatron.core import dist_checkpointing

from hymba_train.outcome import read_outcome
from tests.reliability.conftest import call
from tests.train.test_training import exact, run
from tests.train.tiny_run import write_data

pytestmark = pytest.mark.reliability

PHASE = (
    'data.phases={"only":{"tokens":1792,"seq_length":16,"global_batch_size":8,"micro_batch_size":2,"blend":{"odd":1}}}'
)
SAVES = ["checkpoint.save_interval=4", "checkpoint.keep_last=9"]
SETTINGS = [PHASE, *SAVES, "guards.min_window_steps=6", "logging.eval_interval=0"]
STEPS, BAD = 14, 11  # steps of the run; the bad one, which has samples 80..87
SAMPLE = 84  # in micro-batch 2 of a single process
OPTIMIZERS = {"plain": [], "distributed": ["parallel.distributed_optimizer=true"]}


def guarded(directory: Path, *runs: list[str]) -> str:
    arguments = " then ".join(" ".join(r) for r in runs).split(" ")
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    env = {k: v for k, v in os.environ.items() if k not in launcher}
    command = [sys.executable, "-m", "tests.reliability.guarded_run", str(directory), *arguments]
    code, output = call(command, env, timeout_seconds=280)
    assert code == 0, output
    return output


def bad_run(name: str, kind: str, *settings: str) -> list[str]:
    return run(name, *SETTINGS, f'fault.kind="{kind}"', f"fault.step={BAD}", *settings)


def guard_events(directory: Path, name: str, guard: str = "numerics") -> list[dict]:
    """Events of one guard. On a busy machine there are stragglers among the ranks, too."""
    lines = (directory / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record.get("guard") == guard]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("numerics")
    write_data(path)
    nan_sample = ["sample", f"fault.sample={SAMPLE}"]
    output = guarded(
        path,
        run("clean", *SETTINGS),
        run("unguarded", *SETTINGS, "guards.numerics=false"),
        bad_run("unguarded_nan", "transient", "guards.numerics=false"),
        bad_run("unguarded_spike", "transient", "fault.factor=1000", "guards.numerics=false"),
        bad_run("unguarded_all_nan", "persistent", "guards.numerics=false", "guards.max_skips=2"),
        bad_run("transient", "transient"),
        bad_run("transient_spike", "transient", "fault.factor=1000"),
        bad_run("skip", *nan_sample),
        bad_run("spike", *nan_sample, "fault.factor=100"),
        bad_run("rewind", *nan_sample, 'guards.on_data="rewind"'),
        bad_run("stop", *nan_sample, 'guards.on_data="stop"'),
        bad_run("persistent", "persistent", 'guards.on_persistent="rewind"', "guards.max_rewinds=2"),
        bad_run("many", "persistent", 'guards.on_persistent="skip"', "guards.max_skips=3"),
        run("resumed", *SETTINGS, f"run.train_steps={BAD - 1}"),
        bad_run("resumed", *nan_sample, "fault.factor=100"),
        *(
            bad_run(f"{kind}{name}", "sample", "fault.sample=4", *optimizer, *end)
            for kind, optimizer in OPTIMIZERS.items()
            for name, *end in ([""], ["_halves", "run.train_steps=1", "checkpoint.keep_last=99"], ["_halves"])
        ),
    )
    (path / "output").write_text(output)
    return path


def updates(directory: Path, name: str, first_step: int = 1) -> list[tuple]:
    """Log lines of the steps that were applied, NaN being unequal to itself."""
    return [line for line in exact(directory, name, first_step) if line[0] != BAD]


def test_guards_change_no_bit_of_a_run_without_faults(directory):
    assert len(exact(directory, "clean")) >= STEPS
    assert exact(directory, "clean") == exact(directory, "unguarded")
    assert guard_events(directory, "clean") == []


def test_without_the_guard_a_bad_step_changes_everything_after_it(directory):
    """A NaN is not applied, which loses its batch; a spike is trained on."""
    clean, nan, spike = (exact(directory, name, BAD) for name in ("clean", "unguarded_nan", "unguarded_spike"))
    assert "nan" in str(nan[0]) and "nan" not in str([*nan[1:], *spike])
    for bad in (nan, spike):
        assert len(bad) == len(clean) and not any(line in clean for line in bad)


def test_a_step_that_is_lost_without_the_guard_is_logged(directory):
    """Nobody looks for the cause, but it is not passed over in silence."""
    (event,) = guard_events(directory, "unguarded_nan", "none")
    assert (event["step"], event["action"], event["loss"]) == (BAD, "skipped", None)
    assert event["problem"] == "loss or gradient norm is not finite"
    for name in ("clean", "unguarded", "unguarded_spike"):
        assert guard_events(directory, name, "none") == []


def test_without_the_guard_a_run_that_learns_nothing_any_more_fails(directory):
    outcome = read_outcome(directory / "runs" / "unguarded_all_nan")
    assert outcome.failed and outcome.step == BAD + 2
    assert outcome.reason == "the last 3 steps were not applied: loss or gradient norm is not finite"
    assert "rank 0 of unguarded_all_nan: exit code 76" in (directory / "output").read_text()
    checkpoints = directory / "runs" / "unguarded_all_nan" / "checkpoints"
    assert max(p.name for p in checkpoints.glob("step_*")) == "step_0000012", "the end saves none"


@pytest.mark.parametrize("name", ["transient", "transient_spike"])
def test_a_fault_that_does_not_come_back_costs_nothing(directory, name):
    assert exact(directory, name) == exact(directory, "clean")
    (event,) = guard_events(directory, name)
    assert (event["cause"], event["action"], event["step"], event["num_runs"]) == ("transient", "run again", BAD, 1)
    assert event["data_parallel_ranks"] == [0]


@pytest.mark.parametrize("name", ["skip", "spike"])
def test_a_bad_batch_costs_one_skip_and_is_named(directory, name):
    (event,) = guard_events(directory, name)
    assert (event["cause"], event["action"], event["step"]) == ("data", "skipped", BAD)
    (culprit,) = event["culprits"]
    assert (culprit["data_parallel_rank"], culprit["micro_batch"]) == (0, 2)
    named = {s["sample"]: s for s in culprit["samples"]}
    assert sorted(named) == [SAMPLE, SAMPLE + 1]
    assert named[SAMPLE]["source"] == "odd" and named[SAMPLE]["file"].endswith("odd.bin")
    assert 0 <= named[SAMPLE]["first_document"] <= named[SAMPLE]["last_document"] < 60
    assert exact(directory, name)[: BAD - 1] == exact(directory, "clean")[: BAD - 1]
    assert "nan" not in str(updates(directory, name)), "weights and moments were not touched"
    assert read_outcome(directory / "runs" / name).finished


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_right_after_a_skip_resumes_exactly(directory, name):
    """The very first step is skipped: the checkpoint behind it counts no update, and the moments are still zero."""
    (event,) = guard_events(directory, name)
    assert (event["step"], event["action"]) == (1, "skipped")
    checkpoint = directory / "runs" / f"{name}_halves" / "checkpoints" / "step_0000001"
    assert dist_checkpointing.load_common_state_dict(str(checkpoint))["optimizer_step"] == 0
    whole, halves = exact(directory, name, 2), exact(directory, f"{name}_halves", 2)
    assert whole == halves and len(whole) >= STEPS - 1


def test_a_rewind_leaves_the_bad_samples_out_and_comes_to_the_same_end(directory):
    first, second = guard_events(directory, "rewind")
    assert (first["action"], second["action"]) == ("rewind", "skipped")
    ledger = json.loads((directory / "runs" / "rewind" / "guards.json").read_text())
    assert ledger["num_rewinds"] == 1
    assert [(e["begin"], e["end"]) for e in ledger["left_out"]] == [(80, 88)]
    assert updates(directory, "rewind") == updates(directory, "skip")
    text = (directory / "runs" / "rewind" / "metrics.jsonl").read_text()
    assert '"event": "rewind", "step": 8' in text


def test_a_stop_saves_the_weights_before_the_bad_step_and_says_why(directory):
    outcome = read_outcome(directory / "runs" / "stop")
    assert outcome.failed and outcome.step == BAD - 1
    assert f"step {BAD}: the loss is nan (data: micro-batch 2" in outcome.reason and "odd.bin" in outcome.reason
    assert (directory / "runs" / "stop" / "checkpoints" / f"step_{BAD - 1:07d}").is_dir()
    assert "rank 0 of stop: exit code 76" in (directory / "output").read_text()


def test_what_good_batches_meet_too_is_persistent(directory):
    outcome = read_outcome(directory / "runs" / "persistent")
    assert outcome.failed and "persistent" in outcome.reason and "went back 2 times already" in outcome.reason
    # Steps 11, 12 and 13: every rewind leaves out the step that was bad, and comes to the next one.
    bad = [event for event in guard_events(directory, "persistent") if "cause" in event]
    assert [(e["step"], e["cause"]) for e in bad] == [(BAD + i, "persistent") for i in range(3)]


def test_too_many_skips_end_the_run(directory):
    outcome = read_outcome(directory / "runs" / "many")
    assert outcome.failed and "4 steps skipped within 1000 (guards.max_skips=3): 11, 12, 13, 14" in outcome.reason
    newest = max(p.name for p in (directory / "runs" / "many" / "checkpoints").iterdir())
    assert outcome.step == 13 and newest == "step_0000012", "the weights may be what is wrong: the end saves none"


def test_the_guard_remembers_what_is_usual_across_a_restart(directory):
    saved = json.loads((directory / f"runs/resumed/checkpoints/step_{BAD - 1:07d}/checkpoint.json").read_text())
    assert len(saved["guards"]["loss"]) == BAD - 1
    (event,) = guard_events(directory, "resumed")
    assert (event["step"], event["action"]) == (BAD, "skipped"), "the first step after the restart"


def test_a_forgetful_guard_would_have_trained_on_the_spike(directory):
    """The control of the test before: the same restart from a checkpoint without memory."""
    root = directory / "runs" / "resumed" / "checkpoints"
    import shutil

    from hymba_train.checkpoint import manifest

    copy = directory / "forgetful" / "checkpoints" / f"step_{BAD - 1:07d}"
    shutil.copytree(root / copy.name, copy)
    saved = json.loads((copy / "checkpoint.json").read_text())
    saved["guards"] = None
    (copy / "checkpoint.json").write_text(json.dumps(saved))
    (copy / "manifest.json").unlink()
    manifest.write(copy, manifest.make(copy))
    settings = [f"fault.sample={SAMPLE}", "fault.factor=100", f"run.train_steps={BAD}", f'checkpoint.load="{copy}"']
    guarded(directory, bad_run("forgetful", "sample", *settings))
    assert guard_events(directory, "forgetful") == []
