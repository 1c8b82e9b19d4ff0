"""Real Slurm daemons on loopback, and a tiny experiment to submit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from hymba_train.callbacks.jsonl import read_lines
from hymba_train.config import to_plain
from hymba_train.outcome import read_outcome
from tests.children import child_environment
from tests.train.tiny_run import tiny_config, write_data

HERE, ROOT = Path(__file__).parent, Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
INSTALL = "apt-get install --no-install-recommends slurm-wlm munge"
OVER = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
PATIENCE_SECONDS = 400  # for anything a job does: this machine may be busy
SLOW_MACHINE = "cluster.health_check.timeout_seconds=240"  # a check starts a Python on every node at once
NUM_NODES = 3


class Slurm:
    """The cluster, and what a user does with it."""

    def __init__(self, conf: Path, directory: Path) -> None:
        self.conf, self.directory = conf, directory  # the latter holds data, recipes, runs
        self.environment = child_environment(SLURM_CONF=str(conf), CUDA_VISIBLE_DEVICES="")

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=180)
        assert not check or done.returncode == 0, f"{command} exited {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def hymba(self, *arguments: str) -> subprocess.CompletedProcess:
        """``hymba ...`` in the directory of the data."""
        command = [sys.executable, "-m", "hymba_train", *arguments]
        return subprocess.run(
            command, env=self.environment, cwd=self.directory, capture_output=True, text=True, timeout=300
        )

    def wait_until_idle(self) -> None:
        """Until every node has put the jobs before behind it: a node that is still cleaning up would not be given."""
        end = time.monotonic() + PATIENCE_SECONDS
        while len(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()) < NUM_NODES:
            assert time.monotonic() < end, self.run("sinfo", "-N", "-o", "%N %T %E")
            time.sleep(0.2)

    def launch(self, name: str, *overrides: str, experiment: str = "slurm_tiny") -> Launched:
        """Submit an experiment under the run name ``name``, once all nodes are free."""
        self.wait_until_idle()
        base = ["launch", "slurm", f"experiment={experiment}", "cluster=local_test", f"--config-dir={self.directory}"]
        done = self.hymba(*base, f"run.name={name}", f"run.directory={self.directory}/runs", SLOW_MACHINE, *overrides)
        assert done.returncode == 0, done.stderr
        return Launched(
            self, re.match(r"job ([\d >-]+):", done.stdout)[1].split(" -> "), self.directory / "runs" / name
        )

    def power_off(self, node: str, job: str) -> None:
        """Kill a node's daemon and its tasks of one job, and tell the controller, which else is slow to notice."""
        pid_file = self.conf.parent / f"slurmd.{node}.pid"
        psutil.Process(int(pid_file.read_text())).kill()
        for process in psutil.process_iter():
            try:
                environment = process.environ()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if environment.get("SLURM_JOB_ID") == job and environment.get("SLURMD_NODENAME") == node:
                process.kill()
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def power_on(self, node: str) -> None:
        self.run("/usr/sbin/slurmd", "-f", str(self.conf), "-N", node)
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)  # it may have come back alone


class Launched:
    """One submission."""

    def __init__(self, slurm: Slurm, ids: list[str], directory: Path) -> None:
        self.slurm, self.ids, self.directory = slurm, ids, directory

    def state(self, job: str | None = None) -> str:
        return self.field("JobState", job)

    def field(self, name: str, job: str | None = None) -> str:
        found = re.search(rf"\b{name}=(\S*)", self.slurm.run("scontrol", "-o", "show", "job", job or self.ids[0]))
        return found[1] if found else ""

    def messages(self) -> str:
        """Everything that batch script and ranks have written."""
        files = sorted(self.directory.glob("slurm/*/*.log")) + sorted(self.directory.glob("slurm/*/logs/*.log"))
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')}" for file in files)

    def wait_for(self, what: str, condition) -> None:
        """Until ``condition()`` is true; fails with all messages, at once if every job ends before that."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            over = all(self.state(job) in OVER for job in self.ids)
            if time.monotonic() > end or (over and not condition()):
                states = " ".join(map(self.state, self.ids))
                pytest.fail(f"{what}: not within {PATIENCE_SECONDS} s (jobs {states})\n{self.messages()}")
            time.sleep(0.2)

    def wait_until_over(self, *expected: str) -> None:
        """Until the (first) job has left the queue, in one of the states ``expected``."""
        self.wait_for("end of the job", lambda: self.state() in OVER)
        assert self.state() in expected, self.messages()

    def lines(self, event: str) -> list[dict]:
        return [line for line in read_lines(self.directory / "metrics.jsonl") if line["event"] == event]

    def wait_for_steps(self, number: int, starts: int = 1) -> None:
        """Until the process of start ``starts`` has logged ``number`` steps of its own."""

        def reached() -> bool:
            events = [line["event"] for line in read_lines(self.directory / "metrics.jsonl")]
            positions = [i for i, event in enumerate(events) if event == "start"]
            return len(positions) >= starts and events[positions[starts - 1] :].count("train") >= number

        self.wait_for(f"{number} steps of start {starts}", reached)

    def outcome(self):
        return read_outcome(self.directory)

    def ranks(self) -> list[psutil.Process]:
        """Processes that train this run now, in the order of their ranks."""
        found = {}
        for process in psutil.process_iter():
            try:
                command = process.cmdline()
                is_rank = "hymba_train" in command and "torch.distributed.run" not in command
                if is_rank and command[-1] == str(self.directory / "resolved.yaml"):
                    found[int(process.environ()["RANK"])] = process
            except (psutil.NoSuchProcess, psutil.AccessDenied, KeyError):
                continue
        return [found[rank] for rank in sorted(found)]


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A cluster of three nodes, with the tiny experiment; skips, and says why, where there is no Slurm."""
    path = (
        f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin"  # where the daemons are, and a user's PATH ends before
    )
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        pytest.skip(f"Slurm: no {', '.join(missing)}; {INSTALL}")
    base = tmp_path_factory.mktemp("slurm")
    gpus = "2" if os.geteuid() == 0 else "0"
    try:
        done = subprocess.run(
            ["bash", str(HERE / "minislurm.sh"), "start", str(base / "cluster"), str(NUM_NODES), gpus],
            capture_output=True, text=True, timeout=120, env={**os.environ, "PATH": path, **_pyxis(base)},
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"Slurm: the daemons do not start here: {done.stderr.strip()[-500:]}")
        write_data(base / "work")
        write_experiment(base / "work")
        yield Slurm(base / "cluster" / "slurm.conf", base / "work")
    finally:
        subprocess.run(["bash", str(HERE / "minislurm.sh"), "stop", str(base / "cluster")], capture_output=True)


def write_experiment(directory: Path) -> None:
    """``experiment=slurm_tiny``: a model of four layers, and a line a step."""
    plain = to_plain(tiny_config(directory))
    plain["run"]["directory"] = str(directory / "runs")
    plain["logging"]["eval_interval"] = 0
    plain["data"]["validation_sequences"] = 1
    (directory / "experiment").mkdir(parents=True)
    text = "# @package _global_\n# A model for tests.\ndefaults:\n  - override /model: hymba_tiny\n  - _self_\n"
    (directory / "experiment" / "slurm_tiny.yaml").write_text(text + yaml.safe_dump(plain, sort_keys=False))


def _pyxis(base: Path) -> dict[str, str]:
    """Environment that adds the stand-in for pyxis, where it can be built."""
    if shutil.which("gcc") is None or not Path("/usr/include/slurm/spank.h").exists():
        return {}
    library = base / "pyxis_stub.so"
    subprocess.run(["gcc", "-shared", "-fPIC", str(HERE / "pyxis_stub.c"), "-o", str(library)], check=True)
    return {"MINISLURM_PYXIS": str(library)}
