"""The batch script: a head with this job's facts, which a person can read, and the fixed part launch/job.sh."""

from __future__ import annotations

import math
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from hymba_train import __version__
from launch.cluster import ClusterConfig

FIXED_PART = Path(__file__).with_name("job.sh")


@dataclass(frozen=True)
class Job:
    """What one submission runs. All paths are absolute, as every node sees them."""

    name: str
    cluster_name: str
    cluster: ClusterConfig
    num_nodes: int  # that train; spares come on top
    run_directories: tuple[Path, ...]  # one; of a sweep one a point
    launch: str  # number of this launch of the runs, "0001": their slurm/0001/ holds logs and book-keeping
    directory: Path  # gets the script and its output
    working_directory: Path
    command: str  # that made the script, for its first lines

    @property
    def is_sweep(self) -> bool:
        return len(self.run_directories) > 1

    @property
    def script_path(self) -> Path:
        return self.directory / "job.sh"


def render(job: Job) -> str:
    """The whole script as text."""
    head = [*_title(job), *_directives(job), "", "set -u -o pipefail", "", _heading("This job"), *_facts(job)]
    head += ["", _heading("Its environment"), *_environment(job)]
    return "\n".join(head) + "\n\n" + FIXED_PART.read_text(encoding="utf-8")


def _title(job: Job) -> list[str]:
    processes = job.cluster.ranks_per_node
    sweep = f", {len(job.run_directories)} points" if job.is_sweep else ""
    return [
        "#!/bin/bash",
        f"# {job.name} on cluster {job.cluster_name}: {_count(job.num_nodes, 'node')} x "
        f"{_count(processes, 'process', 'processes')}{sweep}.",
        f"# Written by hymba_train {__version__}: {job.command}",
        "# The configuration is resolved.yaml in the run directory; submit again with hymba launch slurm.",
        "",
    ]


def _heading(text: str) -> str:
    return f"# ---- {text} ".ljust(119, "-")


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _directives(job: Job) -> list[str]:
    cluster, restart = job.cluster, job.cluster.restart
    log = f"{_pattern(job.directory)}/job-{'%A_%a' if job.is_sweep else '%j'}.log"
    gpus = f"gpu:{cluster.gpu_type + ':' if cluster.gpu_type else ''}{cluster.gpus_per_node}"
    cpus = cluster.cpus_per_process and cluster.cpus_per_process * cluster.ranks_per_node
    spare = f"{_count(job.num_nodes, 'node')} to train on, and {cluster.spare_nodes} to replace bad ones"
    parallel = f"%{cluster.sweep_parallel}" if cluster.sweep_parallel else ""
    options: list[tuple[str, object, str | None]] = [
        ("job-name", re.sub(r"[^\w.=+-]", "-", job.name), None),
        ("array", f"0-{len(job.run_directories) - 1}{parallel}" if job.is_sweep else None, "one task a point"),
        ("nodes", job.num_nodes + cluster.spare_nodes, spare if cluster.spare_nodes else None),
        ("ntasks-per-node", 1, "one torchrun, which starts the ranks of its node"),
        ("cpus-per-task", cpus, f"{cluster.cpus_per_process} a rank"),
        ("gres", gpus if cluster.gpus_per_node else None, None),
        ("mem", cluster.memory_per_node, None),
        ("exclusive", "" if cluster.exclusive else None, None),
        ("time", cluster.time_limit, None),
        ("partition", cluster.partition, None),
        ("account", cluster.account, None),
        ("qos", cluster.qos, None),
        ("chdir", _pattern(job.working_directory), "relative paths of the configuration start here"),
        ("output", log, None),
        ("open-mode", "append", "a requeued job goes on in the same file"),
        ("requeue" if restart.max_requeues else "no-requeue", "", None),
        ("signal", f"B:USR1@{restart.signal_seconds_before_limit}", "to this script alone: see ask_to_stop"),
        ("no-kill", "" if cluster.spare_nodes else None, "a node that dies is replaced by a spare"),
    ]
    lines = []
    for name, value, reason in options:
        if value is not None:
            lines += [f"# {reason}"] if reason else []
            lines.append(f"#SBATCH --{name}={value}" if value != "" else f"#SBATCH --{name}")
    return lines + [f"#SBATCH {option}" for option in cluster.extra_sbatch]


def _pattern(path: Path) -> str:
    """A path where sbatch replaces %j and its like, and splits at spaces."""
    text = str(path).replace("%", "%%")
    return text if re.fullmatch(r"[\w@%+=:,./-]*", text) else '"' + text + '"'


def _facts(job: Job) -> list[str]:
    cluster, health, restart = job.cluster, job.cluster.health_check, job.cluster.restart
    if job.is_sweep:
        runs = ["RUN_DIRS=( # one a point", *(f"  {_quote(directory)}" for directory in job.run_directories), ")"]
        runs.append("RUN_DIR=${RUN_DIRS[$SLURM_ARRAY_TASK_ID]}")
    else:
        runs = [f"RUN_DIR={_quote(job.run_directories[0])}"]
    node_check = [
        "--gpus", str(cluster.gpus_per_node), "--min-free-disk-gib", f"{health.min_free_disk_gib:g}",
        "--min-free-memory-gib", f"{health.min_free_memory_gib:g}",
        "--timeout", str(math.ceil(health.timeout_seconds * 0.8)),
        *(["--command", health.command] if health.command else []),
    ]  # fmt: skip
    facts = [
        ("NODES", job.num_nodes, None),
        ("PROCESSES_PER_NODE", cluster.ranks_per_node, None),
        ("SIGNAL_SECONDS", restart.signal_seconds_before_limit, "before the time limit"),
        ("MAX_REQUEUES", restart.max_requeues, "times this job may put itself back into the queue"),
        ("MAX_RESTARTS", restart.max_restarts, "new starts within one allocation after a failure; then requeue"),
        ("NO_PROGRESS_LIMIT", restart.no_progress_limit, "starts in a row from one checkpoint, then give up"),
        ("KILL_GRACE_SECONDS", restart.kill_grace_seconds, "other nodes may go on after the first has ended"),
        ("HEALTH_CHECK", "yes" if health.enabled else "no", None),
        ("HEALTH_CHECK_SECONDS", health.timeout_seconds, "a node that has not answered by then is bad"),
        ("MAX_CLOCK_SKEW", health.max_clock_skew_seconds, "seconds"),
        ("HEAD_ADDRESS_COMMAND", cluster.head_address or "", None),
    ]
    lines = [*runs, f'LAUNCH_DIR="$RUN_DIR/slurm/{job.launch}"']
    lines += [f"{name}={_quote(value)}" + (f" # {reason}" if reason else "") for name, value, reason in facts]
    return [*lines, f"NODE_CHECK=({' '.join(map(_quote, node_check))})"]


def _environment(job: Job) -> list[str]:
    cluster = job.cluster
    variables = _variables(cluster)
    lines = list(cluster.setup)
    if cluster.venv:
        lines.append(f"source {_quote(cluster.venv)}/bin/activate")
    lines.append(f"PYTHON={_quote(interpreter(cluster))}")
    for name, (value, reason) in variables.items():
        lines += [f"# {reason}", f"export {name}={_quote(value)}"]
    srun = list(cluster.extra_srun)
    if cluster.cpus_per_process:  # srun does not inherit it from sbatch since Slurm 22.05
        srun.insert(0, f"--cpus-per-task={cluster.cpus_per_process * cluster.ranks_per_node}")
    lines.append(f"SRUN_OPTIONS=({' '.join(map(_quote, srun))})")
    return [*lines, *_container(job, list(variables))]


def _container(job: Job, variables: list[str]) -> list[str]:
    container = job.cluster.container
    if not container.image:
        return ["IN_ENVIRONMENT=()"]
    options = [f"--container-image={container.image}", "--container-name=hymba"]
    if container.mounts:
        options.append(f"--container-mounts={','.join(container.mounts)}")
    options += [f"--container-workdir={job.working_directory}", "--no-container-mount-home"]
    options.append(f"--container-env={','.join(variables)}")
    return [
        "# The image is unpacked once a node (--container-name); its own environment does not hide ours",
        "# (--container-env).",
        "IN_ENVIRONMENT=(",
        *(f"  {_quote(option)}" for option in options),
        ")",
    ]


def interpreter(cluster: ClusterConfig) -> str:
    """Python that runs on the nodes."""
    if cluster.python:
        return cluster.python
    return "python" if cluster.venv or cluster.container.image else sys.executable


def _variables(cluster: ClusterConfig) -> dict[str, tuple[str, str]]:
    """Name -> (value, reason): ours, with the cluster's on top."""
    ours = {
        "PYTHONUNBUFFERED": ("1", "log lines appear when they are written"),
        "PYTHONFAULTHANDLER": ("1", "a crash in native code leaves a traceback"),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": ("1", "a restarted rank must not find the addresses of dead ones"),
        "OMP_NUM_THREADS": (str(cluster.cpus_per_process or 1), "threads of a rank; left alone, torchrun says 1"),
    }
    if cluster.gpus_per_node:
        ours["CUDA_DEVICE_MAX_CONNECTIONS"] = ("1", "Megatron-Core overlaps tensor-parallel communication only so")
        ours["NCCL_DEBUG"] = ("WARN", "NCCL says why it fails")
    return ours | {name: (v.value, v.reason.strip()) for name, v in cluster.environment.items()}


def _quote(value: object) -> str:
    return shlex.quote(str(value))
