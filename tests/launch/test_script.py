"""The batch script: what a person reads, and that bash can."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.script import FIXED_PART, interpreter, render

GOLDEN = Path(__file__).parent / "golden"
THREE = {
    "slurm_venv": ["cluster.partition=h100", "cluster.account=lab", "cluster.venv=/shared/me/venv"],
    "slurm_container": [
        "cluster.partition=batch", "cluster.account=lab", "cluster.container.image=/shared/me/hymba.sqsh",
        "cluster.container.mounts=[/shared/me:/shared/me,/data:/data:ro]",
    ],
    "slurm_sliced": ["cluster.partition=spot", "cluster.venv=/shared/me/venv"],
}  # fmt: skip


def head_of(text: str) -> str:
    """What differs from script to script."""
    assert text.endswith(FIXED_PART.read_text())
    return text.removesuffix(FIXED_PART.read_text())


@pytest.mark.parametrize("cluster", THREE)
def test_golden(job_of, cluster):
    """The heads; UPDATE_GOLDEN=1 rewrites the files; read the difference before you commit it."""
    text, path = head_of(render(job_of(cluster, *THREE[cluster]))), GOLDEN / f"{cluster}.sh"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("cluster", [*THREE, "local_test"])
@pytest.mark.parametrize("points", [1, 3])
def test_bash_reads_it(job_of, cluster, points):
    text = render(job_of(cluster, *THREE.get(cluster, []), points=points))
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, FIXED_PART.read_text().splitlines())) <= 120


def variables(job, *names: str) -> list[str]:
    """Values that the head of the script gives to shell variables."""
    code = head_of(render(job)) + "".join(f'printf "%s\\0" "${{{name}[@]}}"\n' for name in names)
    environment = {"SLURM_ARRAY_TASK_ID": "1", "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash"], input=code, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ""
    return done.stdout.split("\0")[:-1]


def test_special_characters_reach_bash_as_they_are(job_of):
    odd = 'it\'s "$HOME" `id` $(id) *'
    job = job_of("local_test", f"cluster.health_check.command={odd}", f"cluster.head_address={odd}")
    job.cluster.extra_srun.append(f"--comment={odd}")
    job = replace(job, run_directories=(Path("/shared/me/a run's $HOME"),))
    assert variables(job, "HEAD_ADDRESS_COMMAND", "RUN_DIR", "SRUN_OPTIONS") == [
        odd,
        "/shared/me/a run's $HOME",
        f"--comment={odd}",
    ]
    assert variables(job, "NODE_CHECK")[-2:] == ["--command", odd]


def test_paths_that_sbatch_would_take_apart_are_quoted(job_of):
    job = replace(job_of("local_test"), directory=Path("/shared/my runs/100%/slurm/0001"))
    assert '#SBATCH --output="/shared/my runs/100%%/slurm/0001"/job-%j.log' in render(job)


def test_a_sweep_is_an_array(job_of):
    job = job_of("local_test", "cluster.sweep_parallel=2", points=3)
    text = render(job)
    assert "#SBATCH --array=0-2%2\n" in text and "/job-%A_%a.log\n" in text
    assert variables(job, "RUN_DIR") == [str(job.run_directories[1])]


def test_every_variable_has_its_reason_and_the_cluster_has_the_last_word(job_of):
    job = job_of("slurm_venv", *THREE["slurm_venv"], "cluster.environment.NCCL_DEBUG={value: INFO, reason: a hunt}")
    lines = head_of(render(job)).splitlines()
    exports = [i for i, line in enumerate(lines) if line.startswith("export ")]
    assert len(exports) >= 6 and all(lines[i - 1].startswith("# ") for i in exports)
    assert lines[lines.index("export NCCL_DEBUG=INFO") - 1] == "# a hunt"
    assert "export NCCL_DEBUG=WARN" not in lines


def test_only_what_was_asked_for(job_of):
    head = head_of(render(job_of("local_test")))
    for absent in ("--gres", "--partition", "--account", "--qos", "--mem", "--exclusive", "--no-kill", "NCCL", "None"):
        assert absent not in head, absent
    assert "#SBATCH --requeue\n" in head
    assert "#SBATCH --no-requeue\n" in head_of(render(job_of("slurm_sliced", *THREE["slurm_sliced"])))
    options = ["cluster.gpu_type=h100", "cluster.extra_sbatch=[--reservation=maint]"]
    head = head_of(render(job_of("slurm_venv", *THREE["slurm_venv"], *options)))
    assert "#SBATCH --gres=gpu:h100:8\n" in head and "#SBATCH --reservation=maint\n" in head
    assert "#SBATCH --nodes=17\n" in head and "\nNODES=16\n" in head and "#SBATCH --no-kill\n" in head


def test_the_container_gets_our_environment(job_of):
    job = job_of("slurm_container", *THREE["slurm_container"])
    options = variables(job, "IN_ENVIRONMENT")
    exported = re.findall(r"^export (\w+)=", head_of(render(job)), re.MULTILINE)
    assert f"--container-env={','.join(exported)}" in options and len(exported) >= 6
    assert "--container-mounts=/shared/me:/shared/me,/data:/data:ro" in options
    assert "--container-workdir=/shared/me" in options


def test_the_interpreter(job_of):
    assert interpreter(job_of("local_test").cluster) == sys.executable
    assert interpreter(job_of("slurm_venv", *THREE["slurm_venv"]).cluster) == "python"
    assert interpreter(job_of("local_test", "cluster.python=/opt/python").cluster) == "/opt/python"
    text = render(job_of("slurm_venv", *THREE["slurm_venv"]))
    assert f"source {shlex.quote('/shared/me/venv')}/bin/activate\n" in text
