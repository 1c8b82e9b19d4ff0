"""Whole comparisons on the CPU: identical data, a member that fails, a stop and what goes on after it."""

from __future__ import annotations

import json
import re
import signal
import time

import pytest

from hymba_train.callbacks.jsonl import read_events, read_lines
from hymba_train.exit_codes import STOPPED_EARLY
from hymba_train.outcome import read_outcome, request_stop
from launch.study import main
from tests.compare.conftest import arguments, compare

ATTENTION = ["--member", "attention=model.layer_pattern=[attention]"]
SSM = ["--member", "ssm=model.layer_pattern=[ssm]"]
BROKEN = ["--member", "broken=model.layer_pattern=[hybrid]"]


@pytest.fixture(scope="module")
def whole(study_dir):
    """(exit code, stdout, stderr, table.json) of a comparison of three members, one of which fails, and two seeds."""
    for seed in (1, 2):  # where its checkpoints should go is a file, which shows only when it trains
        broken = study_dir / "runs" / "study" / f"broken-seed{seed}"
        broken.mkdir(parents=True)
        (broken / "checkpoints").write_text("in the way")
    process = compare(study_dir, *ATTENTION, *BROKEN, *SSM, "--seeds", "2", "--jobs", "2", "budget=2048")
    out, err = process.communicate(timeout=280)
    assert process.returncode in (0, 1), err
    return process.returncode, out, err, json.loads((study_dir / "runs" / "study" / "table.json").read_text())


def by_name(table: dict) -> dict:
    return {member["name"]: member for member in table["members"]}


def test_one_that_fails_does_not_lose_the_others(whole, study_dir):
    code, out, err, table = whole
    assert code == 1, out + err
    members = by_name(table)
    assert [members[name]["finished"] for name in ("attention", "broken", "ssm")] == [2, 0, 2]
    for run in members["broken"]["runs"]:
        assert run["state"].startswith("failed (exit code ") and "checkpoints" in run["state"]
    assert err.count("FAILED") == 2 and "broken seed 2: failed" in out


def test_members_saw_the_same_batches_and_seeds_did_not(whole, study_dir):
    table = whole[3]
    assert table["data"] == {"num_compared": 32, "problems": []}  # 2 members to the first, 2 seeds, 8 steps
    hashes = [
        [r["batch_hash"] for r in read_events(study_dir / "runs" / "study" / name / "metrics.jsonl", "train")]
        for name in ("attention-seed1", "ssm-seed1", "attention-seed2")
    ]
    assert hashes[0] == hashes[1] and len(set(hashes[0])) == 8 and not set(hashes[0]) & set(hashes[2])


def test_the_table_holds_what_the_logs_hold(whole, study_dir):
    _, out, _, table = whole
    members, directory = by_name(table), study_dir / "runs" / "study"
    for name in ("attention", "ssm"):
        for seed in (1, 2):
            path = directory / f"{name}-seed{seed}" / "metrics.jsonl"
            run = members[name]["runs"][seed - 1]
            (recall,), (held_out,) = read_events(path, "recall"), read_events(path, "validation")
            assert run["recall"] == {"pairs": recall["tasks"]["pairs"]["accuracy"]}
            assert run["held_out"] == held_out["loss"] and set(run["held_out"]) == {"odd"}
            assert [p["tokens"] for p in run["curve"]] == [256 * i for i in range(1, 9)]
    means = [sum(r["held_out"]["odd"] for r in members[name]["runs"]) / 2 for name in ("attention", "ssm")]
    (row,) = [line for line in out.splitlines() if line.startswith("| ssm |") and "/2 |" in line]
    assert f"{means[1]:.4f} ± " in row and "| 2/2 |" in row
    (pair,) = [d for d in table["differences"] if d["measure"] == "mean_held_out" and d["other"] == "ssm"]
    assert pair["mean"] == pytest.approx(means[1] - means[0]) and pair["num_seeds"] == 2
    assert members["attention"]["cache_bytes"] != members["ssm"]["cache_bytes"]
    assert members["attention"]["flops"] > 0 and members["attention"]["tokens"] == 2048
    assert (directory / "table.md").read_text() == out[out.index("# study") : out.index("\nwritten:")]
    for plot in ("loss_tokens", "loss_flops", "loss_seconds", "recall_cache", "throughput_cache"):
        assert (directory / f"{plot}.png").read_bytes().startswith(b"\x89PNG")


def test_again_finished_runs_stay_and_other_settings_are_refused(whole, study_dir, capsys):
    """Nothing is trained twice, and nothing is mixed with what was trained otherwise."""
    directory = study_dir / "runs" / "study"
    before = {path: path.stat().st_mtime_ns for path in directory.glob("[as]*/metrics.jsonl")}
    assert len(before) == 4
    common = [*ATTENTION, *SSM, "--seeds", "2"]
    assert main(arguments(study_dir, *common, "budget=2048")) == 0
    out = capsys.readouterr()
    assert out.err.count("finished before") == 4 and "4 of 4 runs finished" in out.out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    refused = compare(study_dir, *common, "budget=2048", "optim.lr=0.1")
    _, err = refused.communicate(timeout=120)
    assert refused.returncode == 2
    assert "attention-seed1: optim.lr: 0.003 -> 0.1" in err and "choose another run.name" in err
    refused = compare(study_dir, *common, "budget=4096")
    _, err = refused.communicate(timeout=120)
    assert refused.returncode == 2 and "data.phases.only.tokens: 2048 -> 4096" in err
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.timeout(600)
def test_a_signal_saves_and_the_next_call_goes_on(study_dir):
    """SIGTERM while two runs train: both save, nobody fails; the next call trains the rest in fresh interpreters."""
    settings = [*ATTENTION, *SSM, "run.name=cut", "budget=131072"]
    process = compare(study_dir, *settings, "--jobs", "2")
    directory = study_dir / "runs" / "cut"
    logs = [directory / f"{name}-seed1" / "metrics.jsonl" for name in ("attention", "ssm")]
    deadline = time.monotonic() + 240
    while not all(any(line["event"] == "train" for line in read_lines(path)) for path in logs):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert process.returncode == STOPPED_EARLY, out + err
    assert err.count("saved and stopped, step ") == 2 and "0 of 2 runs finished" in out
    stopped_at = {int(n) for n in re.findall(r"saved and stopped, step (\d+)", err)}
    assert max(stopped_at) < 512
    process = compare(study_dir, *settings, "--jobs", "2", "--fresh")
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, out + err
    for path in logs:
        starts = [line["step"] for line in read_lines(path) if line["event"] == "start"]
        assert len(starts) == 2 and starts[1] in stopped_at, "from its checkpoint, not from the beginning"
        assert [r["step"] for r in read_events(path, "train")] == list(range(1, 513))
        assert len(read_events(path, "recall")) == 1
    table = json.loads((directory / "table.json").read_text())
    assert table["data"] == {"num_compared": 512, "problems": []}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("more", [[], ["--fresh"]], ids=["forks", "fresh"])
def test_runs_do_not_outlive_a_comparison_that_is_killed(study_dir, more):
    """SIGKILL, which it cannot answer: the run saves and stops instead of training on with nobody to report it."""
    name = f"killed{len(more)}"
    process = compare(study_dir, *ATTENTION, *SSM, f"run.name={name}", "budget=10M", *more)
    run = study_dir / "runs" / name / "attention-seed1"
    deadline = time.monotonic() + 240
    while not any(line["event"] == "train" for line in read_lines(run / "metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    while read_outcome(run) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    outcome = read_outcome(run)
    request_stop(run, "this test is over")  # where it has failed
    assert outcome is not None and not outcome.finished and "SIGTERM" in outcome.reason
    process.stdout.close()
    process.stderr.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_time_limit_is_kept_and_loses_nothing(study_dir):
    """Two runs at a time are asked to stop: both save, none fails, there is a table; the next call goes on from there,
    with those that were begun first."""
    settings = [*ATTENTION, *SSM, "run.name=short", "budget=10M", "--seeds", "2", "--jobs", "2"]
    process = compare(study_dir, *settings, "--time-limit", "60")
    out, err = process.communicate(timeout=300)
    assert process.returncode == STOPPED_EARLY, out + err
    assert "not started (--time-limit 60): attention-seed2, ssm-seed2" in err and "0 of 4 runs finished" in out
    stopped_at = dict(re.findall(r"(\S+): saved and stopped, step (\d+)", err))
    assert set(stopped_at) == {"attention-seed1", "ssm-seed1"}, err
    process = compare(study_dir, *settings)
    logs = {name: study_dir / "runs" / "short" / name / "metrics.jsonl" for name in stopped_at}
    deadline = time.monotonic() + 240
    while not all(read_lines(path)[-1]["step"] > int(stopped_at[name]) for name, path in logs.items()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert process.returncode == STOPPED_EARLY, out + err
    for path in logs.values():
        steps = [record["step"] for record in read_events(path, "train")]
        assert steps == list(range(1, len(steps) + 1)), "no step twice, none left out"
