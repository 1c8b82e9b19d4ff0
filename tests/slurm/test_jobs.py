"""Jobs under real Slurm daemons: train, save before the limit, come back, leave out bad nodes, give up."""

from __future__ import annotations

import json
import os
import re
import signal
import sys

import pytest

from tests.slurm.conftest import Launched

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

STEPS = "data.phases.short.tokens=38400"  # 300 steps of 8 x 16 tokens: enough to be cut off in the middle
QUICK = ["run.train_steps=4", "data.phases.short.micro_batch_size=1"]
ONE_NODE = ["cluster.nodes=1", "cluster.processes_per_node=1"]


def losses(job) -> dict[int, str]:
    """Loss of every step as hexadecimal, from the process that trained it last."""
    return {line["step"]: line["loss_hex"] for line in job.lines("train")}


def test_dry_run_says_what_slurm_says(slurm):
    base = ["launch", "slurm", "experiment=slurm_tiny", "cluster=local_test", f"--config-dir={slurm.directory}"]
    base += ["run.name=dry", "data.phases.short.micro_batch_size=1"]
    fine = slurm.hymba(*base, "--dry-run")
    assert fine.returncode == 0 and "--test-only: sbatch: Job" in fine.stderr, fine.stderr
    assert fine.stdout.startswith("#!/bin/bash\n")
    for impossible in ("cluster.gpus_per_node=64", "cluster.partition=gold", "cluster.nodes=4"):
        refused = slurm.hymba(*base, impossible, "cluster.processes_per_node=1", "--dry-run")
        assert refused.returncode == 2 and "sbatch --test-only:" in refused.stderr, (impossible, refused.stderr)
        script = slurm.directory / "refused.sh"
        script.write_text(refused.stdout)
        alone = slurm.run("sbatch", "--test-only", str(script), check=False)
        assert re.sub(r"\s+", " ", alone).strip() in refused.stderr  # the script itself is what Slurm refuses
    assert not (slurm.directory / "runs" / "dry").exists()


def test_the_demo_saves_before_the_limit_comes_back_and_leaves_out_a_bad_node(slurm):
    """The whole story on 2 nodes x 2 ranks, one of three nodes being bad, with the demo on real text."""
    made = slurm.hymba("data", "prepare-demo", "--output", "demo-data")
    assert made.returncode == 0, made.stderr
    bad = 'cluster.health_check.command=test "$SLURMD_NODENAME" != n1'
    short = ["run.train_steps=12", "logging.log_interval=1", "logging.eval_interval=0", "run.device=cpu"]
    data = [f"data.path={slurm.directory}/demo-data", "data.validation_sequences=1"]
    job = slurm.launch("story", "cluster.spare_nodes=1", bad, *short, *data, experiment="demo")
    job.wait_for_steps(3)
    assert len(job.ranks()) == 4
    slurm.run("scancel", "--batch", "--signal=USR1", job.ids[0])  # what --signal=B:USR1@... does near the limit
    job.wait_until_over("COMPLETED")

    assert "node n1 is left out: 'test \"$SLURMD_NODENAME\" != n1' exits with 1" in job.messages()
    assert "training on n2,n3" in job.messages() and "training on n1" not in job.messages()
    assert (job.field("Restarts"), job.field("ExcNodeList")) == ("1", "n1")
    starts, ends, trained = job.lines("start"), job.lines("end"), [line["step"] for line in job.lines("train")]
    assert [end["reason"] for end in ends] == ["time limit", "run.train_steps reached"]
    assert starts[0]["step"] == 0 and starts[1]["step"] == ends[0]["step"] > 0
    assert trained == list(range(1, 13))  # each step once: it went on from the very step
    assert job.outcome().finished and not (job.directory / "stop_requested").exists()
    listed = json.loads(slurm.hymba("runs", "--json").stdout)
    (mine,) = [run for run in listed if run["name"] == "story"]
    assert (mine["state"], mine["step"], mine["restarts"], mine["checkpoint"]) == ("finished", 12, 1, 12)
    shown = slurm.hymba("runs", "show", "story").stdout
    assert "loss (nats per token)" in shown and f"job         {job.ids[0]}: " in shown


def test_a_dead_rank_is_replaced_within_the_allocation(slurm):
    job = slurm.launch(
        "dead_rank", STEPS, "cluster.nodes=2", "cluster.processes_per_node=1", "run.train_steps=120",
        "checkpoint.save_interval=10", "cluster.restart.kill_grace_seconds=10",
    )  # fmt: skip
    job.wait_for("a checkpoint", lambda: job.lines("checkpoint"))
    os.kill(job.ranks()[1].pid, signal.SIGKILL)
    job.wait_until_over("COMPLETED")
    starts = job.lines("start")
    assert len(starts) == 2 and starts[1]["step"] >= 10 and starts[1]["step"] % 10 == 0
    assert "training failed" in job.messages() and job.field("Restarts") == "0"
    twice = [line for line in job.lines("train") if starts[1]["step"] < line["step"]]
    again = {line["step"]: set() for line in twice}
    for line in twice:
        again[line["step"]].add(line["loss_hex"])
    assert all(len(values) == 1 for values in again.values())  # what is trained again comes out the same, bit for bit
    assert sorted(losses(job)) == list(range(1, 121))


def test_gives_up_without_progress(slurm):
    job = slurm.launch("no_progress", *ONE_NODE, *QUICK, "cluster.restart.no_progress_limit=2")
    (job.directory / "resolved.yaml").write_text("model: {}\n")  # every start fails
    job.wait_until_over("FAILED")
    assert "giving up: 2 starts in a row from checkpoint none" in job.messages()
    assert (job.directory / "slurm" / "0001" / "starts").read_text().count("none job") == 2
    assert job.field("Restarts") == "0"


def test_a_second_job_in_the_same_directory_is_refused(slurm):
    job = slurm.launch("twice", *ONE_NODE, *QUICK, "cluster.extra_sbatch=[--hold]")
    again = slurm.hymba(
        "launch", "slurm", "experiment=slurm_tiny", "cluster=local_test", f"--config-dir={slurm.directory}",
        "run.name=twice", *ONE_NODE, *QUICK,
    )  # fmt: skip
    slurm.run("scancel", job.ids[0])
    assert again.returncode == 2 and f"job {job.ids[0]} of this run is PENDING" in again.stderr


@pytest.mark.slow
def test_the_users_own_stop_ends_the_job_and_its_chain(slurm):
    job = slurm.launch(
        "own_stop", STEPS, *ONE_NODE, "cluster.restart.max_requeues=0", "cluster.restart.chain=2"
    )  # fmt: skip
    job.wait_for_steps(2)
    (job.directory / "stop_requested").touch()
    job.wait_until_over("COMPLETED")
    assert (job.outcome().finished, job.outcome().reason) == (False, "stop_requested")
    job.wait_for("the chain to end", lambda: job.state(job.ids[1]) == "CANCELLED")


@pytest.mark.slow
def test_the_real_time_limit_and_a_chain(slurm):
    """Slurm itself signals before the limit; where requeueing is forbidden the next job of the chain goes on."""
    job = slurm.launch(
        "chain", "data.phases.short.tokens=1280000", *ONE_NODE, "cluster.time_limit=00:01:00",
        "cluster.restart.signal_seconds_before_limit=30", "cluster.restart.max_requeues=0", "cluster.restart.chain=2",
    )  # fmt: skip
    job.wait_until_over("FAILED")
    assert job.field("ExitCode") == "75:0" and job.outcome().reason == "time limit"
    stopped = job.outcome().step
    job.wait_for("the second job", lambda: len(job.lines("start")) == 2)
    assert job.lines("start")[1]["step"] == stopped
    slurm.run("scancel", job.ids[1])


@pytest.mark.slow
def test_a_bad_node_without_a_spare_is_excluded_from_the_requeued_job(slurm):
    bad = 'cluster.health_check.command=test "$SLURMD_NODENAME" != n1'
    job = slurm.launch("excluded", "cluster.nodes=2", "cluster.processes_per_node=1", *QUICK, bad)
    job.wait_until_over("COMPLETED")
    assert (job.field("Restarts"), job.field("ExcNodeList"), job.field("NodeList")) == ("1", "n1", "n[2-3]")


@pytest.mark.slow
def test_requeues_end(slurm):
    job = slurm.launch("requeues", STEPS, *ONE_NODE, "cluster.restart.max_requeues=1")
    for start in (1, 2):
        job.wait_for_steps(1, starts=start)
        slurm.run("scancel", "--batch", "--signal=USR1", job.ids[0])
    job.wait_until_over("FAILED")
    assert job.field("ExitCode") == "75:0" and "max_requeues=1 reached" in job.messages()


@pytest.mark.slow
def test_a_training_that_does_not_react_is_requeued_all_the_same(slurm):
    limits = ["cluster.restart.signal_seconds_before_limit=64", "cluster.restart.max_requeues=1"]
    job = slurm.launch("hung", STEPS, *ONE_NODE, *limits, "run.train_steps=40")
    job.wait_for_steps(1)
    os.kill(job.ranks()[0].pid, signal.SIGSTOP)
    slurm.run("scancel", "--batch", "--signal=USR1", job.ids[0])
    job.wait_for("the requeue", lambda: job.field("Restarts") == "1")
    assert "training did not stop in time" in job.messages()
    job.wait_until_over("COMPLETED")


@pytest.mark.slow
def test_a_sweep_is_one_array(slurm):
    done = slurm.hymba(
        "launch", "slurm", "experiment=slurm_tiny", "cluster=local_test", f"--config-dir={slurm.directory}",
        "run.name=grid", *ONE_NODE, *QUICK, "--sweep=optim.lr=1e-2,5e-3", "cluster.sweep_parallel=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    array = re.match(r"job (\d+):", done.stdout)[1]

    points = [
        Launched(slurm, [f"{array}_{i}"], slurm.directory / "runs" / f"grid-lr={v}")
        for i, v in enumerate((0.01, 0.005))
    ]
    for point in points:
        point.wait_until_over("COMPLETED")
        assert point.outcome().step == 4
    assert losses(points[0]) != losses(points[1])


@pytest.mark.slow
def test_a_container_is_asked_for_on_every_step(slurm):
    if not (slurm.directory.parent / "pyxis_stub.so").exists():
        pytest.skip("pyxis stand-in: needs gcc and libslurm-dev")

    mounts = f"cluster.container.mounts=[{slurm.directory}:{slurm.directory}]"
    job = slurm.launch(
        "container", *ONE_NODE, *QUICK, "cluster.container.image=site#hymba:1", mounts,
        f"cluster.python={sys.executable}",
        'cluster.health_check.command=test "$PYXIS_STUB_CONTAINER_IMAGE" = "site#hymba:1"',
    )  # fmt: skip
    job.wait_until_over("COMPLETED")
    environment = job.slurm.run("grep", "-c", "container-env", str(job.directory / "slurm" / "0001" / "job.sh"))
    assert int(environment) >= 1 and job.outcome().finished


@pytest.mark.slow
def test_a_node_that_dies_is_replaced_by_the_spare(slurm):
    """The daemon and every process of n2 are killed, as by a power cut."""
    options = ["cluster.nodes=2", "cluster.processes_per_node=1", "cluster.spare_nodes=1", "run.train_steps=80"]
    job = slurm.launch("power_cut", STEPS, *options, "checkpoint.save_interval=10", "cluster.time_limit=00:10:00")
    job.wait_for("a checkpoint", lambda: job.lines("checkpoint"))
    try:
        slurm.power_off("n2", job.ids[0])
        job.wait_until_over("COMPLETED")
    finally:
        slurm.power_on("n2")
    assert "training on n1,n3" in job.messages() and job.field("Restarts") == "0"
    assert sorted(losses(job)) == list(range(1, 81))
