"""Is this cluster possible? Every problem is one line that names the key and what to do."""

from __future__ import annotations

import re
from typing import Any

from hymba_train.config import secrets
from hymba_train.config.typed import flatten, to_plain
from launch.cluster import ClusterConfig

# What the rendered script sets itself, and the key that governs it. A user's own line would contradict it.
MANAGED = {
    "--nodes": "nodes", "-N": "nodes", "--ntasks": "nodes", "-n": "nodes", "--ntasks-per-node": "processes_per_node",
    "--gres": "gpus_per_node", "--gpus-per-node": "gpus_per_node", "--time": "time_limit", "-t": "time_limit",
    "--partition": "partition", "-p": "partition", "--account": "account", "-A": "account", "--qos": "qos",
    "-q": "qos", "--exclusive": "exclusive", "--mem": "memory_per_node",
    "--signal": "restart.signal_seconds_before_limit",
    "--requeue": "restart.max_requeues", "--no-requeue": "restart.max_requeues", "--dependency": "restart.chain",
    "-d": "restart.chain", "--array": "sweep_parallel", "-a": "sweep_parallel",
    "--cpus-per-task": "cpus_per_process", "-c": "cpus_per_process",
    "--output": "", "-o": "", "--error": "", "-e": "", "--open-mode": "", "--job-name": "", "-J": "", "--chdir": "",
    "-D": "",
}  # fmt: skip
AT_LEAST = {
    "gpus_per_node": 0, "processes_per_node": 1, "nodes": 1, "spare_nodes": 0, "cpus_per_process": 1,
    "sweep_parallel": 1, "health_check.timeout_seconds": 10, "health_check.min_free_disk_gib": 0,
    "health_check.min_free_memory_gib": 0, "health_check.max_clock_skew_seconds": 1,
    "restart.signal_seconds_before_limit": 30, "restart.max_requeues": 0, "restart.chain": 1,
    "restart.max_restarts": 0, "restart.no_progress_limit": 1, "restart.kill_grace_seconds": 10,
}  # fmt: skip
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def seconds_of(time_limit: str) -> int | None:
    """Seconds of sbatch's --time forms; None if it is none of them.

    >>> [seconds_of(t) for t in ("30", "10:30", "04:00:00", "1-12", "1-12:30", "2-00:00:01", "soon")]
    [1800, 630, 14400, 129600, 131400, 172801, None]
    """
    match = _TIME.fullmatch(time_limit)
    if match is None:
        return None
    days, first, second, third = (None if part is None else int(part) for part in match.groups())
    if days is not None:
        return days * 86400 + first * 3600 + (second or 0) * 60 + (third or 0)
    if third is not None:
        return first * 3600 + second * 60 + third
    return first * 60 + (second or 0)


def check_cluster(cluster: ClusterConfig) -> list[str]:
    """One line a problem; none if the cluster is possible."""
    problems = [
        f"cluster.{key}={value}: must be at least {AT_LEAST[key]}"
        for key, value in flatten(to_plain(cluster)).items()
        if key in AT_LEAST and value is not None and value < AT_LEAST[key]
    ]
    problems += _check_text(cluster)
    problems += _check_time(cluster)
    problems += _check_processes(cluster)
    problems += _check_software(cluster)
    problems += _check_options(cluster)
    if cluster.restart.chain > 1 and cluster.restart.max_requeues > 0:
        problems.append(
            f"cluster.restart.chain={cluster.restart.chain}: a job that requeues itself needs no chain; "
            "set cluster.restart.max_requeues=0, or chain=1"
        )
    return problems


def _check_text(cluster: ClusterConfig) -> list[str]:
    """No line breaks in what becomes a line of the script."""

    def strings(value: Any) -> list[str]:
        if isinstance(value, list):
            return [text for item in value for text in strings(item)]
        return [value] if isinstance(value, str) else []

    return [
        f"cluster.{key}: must be one line of printable text; got {text!r}"
        for key, value in flatten(to_plain(cluster)).items()
        for text in strings(value)
        if not text.isprintable() or not text.strip()
    ]


def _check_time(cluster: ClusterConfig) -> list[str]:
    seconds = seconds_of(cluster.time_limit)
    if not seconds:
        return [f"cluster.time_limit={cluster.time_limit}: write HH:MM:SS or D-HH:MM:SS"]
    warning = cluster.restart.signal_seconds_before_limit
    if warning >= seconds:
        return [
            f"cluster.restart.signal_seconds_before_limit={warning}: must be below the time limit of {seconds} seconds"
        ]
    return []


def _check_processes(cluster: ClusterConfig) -> list[str]:
    processes, gpus = cluster.processes_per_node, cluster.gpus_per_node
    if processes is None and gpus == 0:
        return ["cluster.processes_per_node: to be given where gpus_per_node is 0"]
    if processes is not None and 0 < gpus < processes:
        return [f"cluster.processes_per_node={processes}: more than the {gpus} GPUs of a node; give {gpus} at most"]
    return []


def _check_software(cluster: ClusterConfig) -> list[str]:
    problems = []
    if cluster.container.image and cluster.venv:
        problems.append("cluster.venv: a container brings its own environment; leave out venv, or container.image")
    if cluster.container.mounts and not cluster.container.image:
        problems.append("cluster.container.mounts: there is no container; give container.image, or leave them out")
    for mount in cluster.container.mounts:
        if not re.fullmatch(r"/[^:,]*:/[^:,]*(:[^:,]+)?", mount):
            problems.append(f"cluster.container.mounts: {mount!r} is not /SOURCE:/TARGET[:FLAGS] without commas")
    for name, variable in cluster.environment.items():
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            problems.append(f"cluster.environment.{name}: no name of an environment variable")
        elif secrets.NAME.search(name):
            problems.append(
                f"cluster.environment.{name}: looks like a secret, which scripts must not hold; export it where you "
                "run hymba launch: sbatch hands it on"
            )
        elif not variable.reason.strip():
            problems.append(f"cluster.environment.{name}.reason: say why it is set")
    return problems


def _check_options(cluster: ClusterConfig) -> list[str]:
    problems = []
    for key, options in (("extra_sbatch", cluster.extra_sbatch), ("extra_srun", cluster.extra_srun)):
        for option in options:
            if not option.strip():
                continue  # _check_text has said it
            name = option.split("=")[0].split()[0]
            if not name.startswith("-"):
                problems.append(f'cluster.{key}: {option!r} is no option; write it as "--constraint=h100"')
            elif key == "extra_sbatch" and name in MANAGED:
                by = f"cluster.{MANAGED[name]} sets it" if MANAGED[name] else "the script sets it"
                problems.append(f"cluster.extra_sbatch: {option!r}: {by}; leave it out")
    return problems
