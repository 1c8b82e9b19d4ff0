"""What the batch script decides, with stand-ins for srun and scontrol. (tests/slurm: the same under real Slurm.)"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch.script import render

# `check NODE` and `train` are bash functions of each test; every call of scontrol and srun is noted in calls.
STAND_INS = """
scontrol() {
  echo "scontrol $*" >> "$CALLS"
  case "$1 $2" in
    "show hostnames") printf '%s\\n' $HOSTS ;;
    "show node") echo "NodeName=$3 NodeAddr=${ADDRESS:-localhost} x=1" ;;
    "show job") echo "JobId=7 ReqNodeList=(null) ExcNodeList=${EXCLUDED:-(null)}" ;;
    "requeue 7") [[ ${REQUEUE:-yes} == yes ]] ;;
  esac
}
srun() {
  echo "srun $*" >> "$CALLS"
  local result='' argument previous='' node=''
  for argument; do
    [[ $previous == --result ]] && result=$argument
    [[ $argument == --nodelist=* ]] && node=${argument#*=}
    previous=$argument
  done
  if [[ -n $result ]]; then check "$node" > "$result.tmp" && mv "$result.tmp" "$result"
  elif [[ $* == *torch.distributed.run* ]]; then train
  elif [[ $* == *hostname* ]]; then echo "127.0.1.1 10.0.0.5"
  fi
}
timeout() { while [[ $1 != srun ]]; do shift; done; "$@"; }
sleep() { command sleep 0.05; }
check() { echo "ok $(date +%s)"; }
publish() { mkdir -p "$RUN_DIR/checkpoints"; echo "$1" > "$RUN_DIR/checkpoints/latest"; }
"""


class Script:
    """The rendered script with stand-ins put in front of its fixed part."""

    def __init__(self, directory: Path, job) -> None:
        self.run, self.calls_file = directory / "run", directory / "calls"
        self.run.mkdir()
        self.job = replace(job, run_directories=(self.run,))
        self.environment = {
            "PATH": os.environ["PATH"], "CALLS": str(self.calls_file), "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-3]", "HOSTS": "n1 n2 n3",
        }  # fmt: skip

    def start(self, behaviour: str, **environment: str) -> subprocess.Popen:
        head, mark, fixed = render(self.job).partition("set -u -o pipefail\n")
        return subprocess.Popen(
            ["bash", "-c", f"{head}{mark}{STAND_INS}\n{behaviour}\n{fixed}"], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env={**self.environment, **environment},
        )  # fmt: skip

    def __call__(self, behaviour: str, **environment: str) -> tuple[int, str]:
        process = self.start(behaviour, **environment)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines()

    def requeues(self) -> list[str]:
        return [call for call in self.calls if call.startswith("scontrol requeue")]

    def trainings(self) -> list[str]:
        return [call for call in self.calls if "torch.distributed.run" in call]


@pytest.fixture
def script(tmp_path, job_of):
    options = ["cluster.nodes=2", "cluster.spare_nodes=1", "cluster.restart.no_progress_limit=2"]
    return Script(tmp_path, job_of("local_test", *options))


FINISHES = 'train() { echo "finished 30 all phases trained" > "$RUN_DIR/outcome"; }'
FAILS = "train() { return 1; }"


def test_a_finished_run_ends_the_job(script):
    code, output = script(FINISHES)
    assert (code, "finished at step 30" in output) == (0, True)
    (training,) = script.trainings()
    assert "--nodelist=n1,n2 " in training and "--rdzv-endpoint=localhost:20071" in training
    assert f"-m hymba_train train --frozen {script.run}/resolved.yaml" in training
    assert "--nnodes=2 --nproc-per-node=2 --max-restarts=0" in training
    assert not script.requeues()


def test_what_an_earlier_start_left_is_forgotten(script):
    (script.run / "outcome").write_text("finished 9 all phases trained\n")
    (script.run / "stop_requested").touch()
    code, output = script(
        'train() { [[ ! -e $RUN_DIR/stop_requested ]] && echo "stopped 4 mine" > "$RUN_DIR/outcome"; }'
    )
    assert code == 0 and "saved and stopped at step 4: mine" in output


def send_while_training(script, number: int, behaviour: str, **environment: str) -> tuple[int, str]:
    process = script.start(behaviour, **environment)
    end = time.monotonic() + 30
    while not (script.run / "training").exists() and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


OBEYS = """train() {
  touch "$RUN_DIR/training"
  while [[ ! -e $RUN_DIR/stop_requested ]]; do command sleep 0.05; done
  read -r reason < "$RUN_DIR/stop_requested"; publish step_0000012; echo "stopped 12 $reason" > "$RUN_DIR/outcome"
}"""


def test_the_signal_before_the_limit_saves_and_requeues(script):
    code, output = send_while_training(script, signal.SIGUSR1, OBEYS)
    assert code == 75 and "saved and stopped at step 12: time limit" in output
    assert script.requeues() == ["scontrol requeue 7"]


def test_requeues_are_counted(script):
    code, output = send_while_training(script, signal.SIGUSR1, OBEYS, SLURM_RESTART_COUNT="3")
    assert code == 75 and "max_requeues=3 reached" in output
    assert not script.requeues()


def test_a_site_that_forbids_requeueing_is_told_of(script):
    code, output = send_while_training(script, signal.SIGUSR1, OBEYS, REQUEUE="no")
    assert code == 75 and "scontrol requeue failed; submit again" in output


def test_scancel_saves_and_does_not_come_back(script):
    code, output = send_while_training(script, signal.SIGTERM, OBEYS)
    assert code == 75 and "saved and stopped at step 12" in output
    assert not script.requeues()


def test_ranks_that_slurm_signalled_themselves_come_back(script):
    code, _ = script('train() { echo "stopped 12 signal SIGTERM" > "$RUN_DIR/outcome"; }')
    assert code == 75 and "scontrol requeue 7" in script.calls


def test_the_users_stop_does_not_come_back(script):
    code, _ = script('train() { echo "stopped 12 stop_requested" > "$RUN_DIR/outcome"; }')
    assert code == 0 and not script.requeues()


def test_what_a_guard_has_ended_ends_the_job(script):
    code, output = script('train() { echo "failed 12 11 steps skipped" > "$RUN_DIR/outcome"; return 1; }')
    assert code == 76 and "ended by a guard at step 12: 11 steps skipped" in output
    assert len(script.trainings()) == 1 and not script.requeues()


def test_ranks_that_torchrun_restarts_do_not_meet_the_addresses_of_dead_ones(script):
    shared = '[[ $TORCH_DISABLE_SHARE_RDZV_TCP_STORE == 1 ]] && echo "finished 30 all" > "$RUN_DIR/outcome"'
    assert script(f"train() {{ {shared}; }}")[0] == 0


def test_a_failure_starts_again_and_gives_up_without_progress(script):
    code, output = script(FAILS)
    assert code == 1 and "giving up: 2 starts in a row from checkpoint none" in output
    assert len(script.trainings()) == 2
    ids = [word for call in script.trainings() for word in call.split() if word.startswith("--rdzv-id")]
    assert ids == ["--rdzv-id=7.0.1", "--rdzv-id=7.0.2"]


def test_the_count_outlives_a_requeue(script):
    (script.run / "slurm" / "0001").mkdir(parents=True)
    (script.run / "slurm" / "0001" / "starts").write_text("none job 7 restart 0\nnone job 7 restart 1\n")
    code, _ = script(FAILS, SLURM_RESTART_COUNT="2")
    assert code == 1 and not any("torch" in call for call in script.calls)


def test_failures_with_progress_requeue_in_the_end(script):
    code, _ = script('train() { publish "step_000000$attempt"; return 1; }')
    assert code == 75 and len(script.trainings()) == 4 and "scontrol requeue 7" in script.calls  # max_restarts=3


def test_a_bad_node_makes_way_for_the_spare(script):
    code, output = script(
        FINISHES + '\ncheck() { [[ $1 == n1 ]] && echo "bad $(date +%s) GPU 3 is gone" || echo "ok $(date +%s)"; }'
    )
    assert code == 0 and "node n1 is left out: GPU 3 is gone" in output
    assert "--nodelist=n2,n3 " in script.trainings()[0]


def test_no_answer_and_a_wrong_clock_are_bad(script):
    behaviour = 'check() { case $1 in n1) return 1 ;; n2) echo "ok 1000" ;; n3) echo "ok $(date +%s)" ;; esac; }'
    code, output = script(FINISHES + "\n" + behaviour, EXCLUDED="n9")
    assert code == 75 and "node n1 is left out: it gave no answer" in output
    assert "node n2 is left out: its clock is more than 10 s away" in output
    assert "only 1 of 2 nodes are good" in output
    assert "scontrol update JobId=7 ExcNodeList=n1,n2,n9 NumNodes=2 NumTasks=2" in script.calls
    assert not script.trainings()


def test_without_the_check_the_first_nodes_train(tmp_path, job_of):
    script = Script(tmp_path, job_of("local_test", "cluster.nodes=2", "cluster.health_check.enabled=false"))
    code, _ = script(FINISHES)
    assert code == 0 and not any("node_check" in call for call in script.calls)
    assert "--nodelist=n1,n2 " in script.trainings()[0]


@pytest.mark.parametrize(
    ("options", "address", "expected"),
    [
        ([], "localhost", "localhost"),
        ([], "no-such-host.invalid", "10.0.0.5"),
        (["cluster.head_address=echo $1-ib"], "localhost", "n1-ib"),
        (["cluster.nodes=1"], "localhost", "127.0.0.1"),
    ],
)
def test_the_address_of_the_first_node(tmp_path, job_of, options, address, expected):
    script = Script(tmp_path, job_of("local_test", "cluster.nodes=2", *options))
    script(FINISHES, ADDRESS=address)
    assert f"--rdzv-endpoint={expected}:20071" in script.trainings()[0]


def test_training_that_does_not_stop_is_requeued_before_the_limit(tmp_path, job_of):
    options = ["cluster.nodes=2", "cluster.restart.signal_seconds_before_limit=61"]
    script = Script(tmp_path, job_of("local_test", *options))
    hangs = 'train() { touch "$RUN_DIR/training"; command sleep 3; }'
    code, output = send_while_training(script, signal.SIGUSR1, hangs)
    assert code == 75 and "training did not stop in time" in output and "scontrol requeue 7" in script.calls


def test_a_task_of_an_array_requeues_itself_alone(tmp_path, job_of):
    script = Script(tmp_path, job_of("local_test", "cluster.nodes=2"))
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
    script('train() { echo "stopped 12 signal SIGTERM" > "$RUN_DIR/outcome"; }', **array)
    assert "scontrol requeue 5_2" in script.calls
