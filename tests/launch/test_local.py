"""``hymba launch local``: started again after failures, stopped in good order. A shell stands in for torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hymba_train.cli import main
from launch import local

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def train(tmp_path):
    """train("bash code", max_restarts) -> (exit code, messages, number of starts); the run directory is $RUN."""

    def start(code: str, max_restarts: int = 3) -> tuple[int, str, int]:
        said: list[str] = []
        (tmp_path / "starts").write_text("")
        script = f"RUN={tmp_path}; echo >> $RUN/starts; n=$(wc -l < $RUN/starts); {code}"
        result = local.supervise(["bash", "-c", script], tmp_path, max_restarts, said.append)
        return result, "\n".join(said), len((tmp_path / "starts").read_text().splitlines())

    return start


CHECKPOINT = (
    "c=$RUN/checkpoints/step_000000$n; mkdir -p $c; touch $c/checkpoint.json $c/metadata.json $c/.metadata; "
    "echo step_000000$n > $RUN/checkpoints/latest; "
)


def test_finished(train):
    assert train("echo finished 5 all > $RUN/outcome") == (0, "", 1)


def test_stopped_early_has_its_own_code(train):
    code, said, starts = train("echo stopped 5 stop_requested > $RUN/outcome")
    assert (code, starts) == (75, 1) and "saved and stopped at step 5: stop_requested" in said


def test_what_a_guard_has_ended_is_not_started_again(train):
    code, said, starts = train("echo failed 5 11 steps skipped > $RUN/outcome; exit 76")
    assert (code, starts) == (76, 1) and "ended by a guard at step 5: 11 steps skipped" in said


def test_a_restart_does_not_meet_the_addresses_of_dead_ranks(train, monkeypatch):
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    code, _, starts = train('[ "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" = 1 ] && echo finished 5 all > $RUN/outcome')
    assert (code, starts) == (0, 1)


def test_an_old_outcome_does_not_count(train, tmp_path):
    (tmp_path / "outcome").write_text("finished 5 all\n")
    code, said, starts = train("exit 3", max_restarts=0)
    assert (code, starts) == (1, 1) and "exit code 3" in said and "no restarts left" in said


def test_a_failure_starts_again(train):
    code, said, starts = train("[ $n = 3 ] && echo finished 5 all > $RUN/outcome || exit 1")
    assert (code, starts) == (0, 3) and "starting again, 3 more" in said and "starting again, 2 more" in said


def test_without_progress_it_gives_up(train):
    code, said, starts = train("exit 1", max_restarts=9)
    assert (code, starts) == (1, 3) and "giving up: 3 starts in a row from checkpoint none" in said


def test_with_progress_it_goes_on(train):
    code, _, starts = train(CHECKPOINT + "exit 1", max_restarts=5)
    assert (code, starts) == (1, 6)


def supervised(tmp_path, code: str) -> subprocess.Popen:
    program = (
        "import sys, pathlib\nfrom launch.local import supervise\n"
        f"sys.exit(supervise(['bash', '-c', {code!r}], pathlib.Path({str(tmp_path)!r}), 3))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (tmp_path / "training").exists() and time.monotonic() < end:
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_to_stop(tmp_path, number):
    code = (
        f"cd {tmp_path}; touch training; while [ ! -e stop_requested ]; do sleep 0.05; done; "
        'echo "stopped 7 $(cat stop_requested)" > outcome'
    )
    process = supervised(tmp_path, code)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    name = signal.Signals(number).name
    assert process.returncode == 75 and f"saved and stopped at step 7: signal {name}" in err


def test_a_second_signal_ends_everything(tmp_path):
    code = f"cd {tmp_path}; setsid sleep 300 & echo $! > grandchild; touch training; wait"
    process = supervised(tmp_path, code)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "once more ends it at once" in err
    grandchild = Path(f"/proc/{(tmp_path / 'grandchild').read_text().strip()}")
    assert not grandchild.exists() or "State:\tZ" in (grandchild / "status").read_text()


def test_the_command(capsys, tmp_path, monkeypatch):
    data = tmp_path / "data"
    (data / "tokenizer").mkdir(parents=True)
    (data / "tokenizer" / "tokenizer.json").touch()
    for source in ("books", "speeches", "docs", "code"):
        (data / f"{source}.bin").touch()
        (data / f"{source}.idx").touch()
    base = ["launch", "local", "experiment=demo", f"data.path={data}", f"run.directory={tmp_path / 'runs'}"]
    assert main([*base, "--nproc", "2", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "--nproc-per-node=2" in out and f"--frozen {tmp_path}/runs/demo/resolved.yaml" in out
    assert not (tmp_path / "runs").exists()
    for arguments, expected in (
        (["--nproc", "0"], "--nproc 0: give at least 1"),
        (["--max-restarts", "-1"], "--max-restarts -1: give at least 0"),
        (["cluster=local_test"], "this machine needs no cluster"),
        (["parallel=tp2", "--nproc", "3"], "parallel.world_size=2, but 3 processes run"),
    ):
        assert main([*base, *arguments, "--dry-run"]) == 2
        assert expected in capsys.readouterr().err


def test_gpus_are_counted_without_torch(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    assert local.num_gpus() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.num_gpus() == 0
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho 'GPU 1: A (UUID: y)'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert local.num_gpus() == 2
    monkeypatch.setenv("PATH", "/nowhere")
    assert local.num_gpus() == 0
