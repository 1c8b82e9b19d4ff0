"""``hymba launch slurm``: compose and plan once, freeze, render, submit."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from hymba_train.config import freeze_run
from hymba_train.errors import UserError
from hymba_train.runs.slurm_jobs import LAUNCH_FILE, SLURM, in_queue, launches
from launch.cluster import ClusterConfig
from launch.cluster_files import load_cluster, split_overrides
from launch.points import Point, make_points
from launch.script import Job, render

REFUSED = 2


def run_slurm(args: argparse.Namespace) -> int:
    """The verb; returns the exit code. Raises UserError."""
    if args.nodes is not None and args.nodes < 1:
        raise UserError(f"--nodes {args.nodes}: give at least 1")
    if args.skip_paths and not args.dry_run:
        raise UserError("--skip-paths: only with --dry-run")
    own, of_run = split_overrides(args.overrides)
    name, cluster = load_cluster(own, args.config_dir)
    points = make_points(of_run, args.sweep, cluster, args.nodes, args.config_dir, not args.skip_paths)
    return submit_points(points, name, cluster, _command(args), args.dry_run, not args.skip_paths)


def submit_points(
    points: Sequence[Point], name: str, cluster: ClusterConfig, command: str, dry: bool = False,
    check_paths: bool = True,
) -> int:  # fmt: skip
    """Check what the nodes will see, then submit all points as one job, or only show it. Raises UserError."""
    problems = _unreachable(points, cluster, check_paths)
    if len(points) > 1 and cluster.restart.chain > 1:
        problems.append("cluster.restart.chain: a chain of arrays is not possible; set cluster.restart.chain=1")
    if problems:
        raise UserError(*problems)
    job = make_job(points, name, cluster, command)
    if dry:
        return dry_run(job)
    if shutil.which("sbatch") is None:
        raise UserError("sbatch: not found; run this where Slurm's commands are, or add --dry-run to see the script")
    for point in points:
        _refuse_second_job(point.directory)
    return submit(job, points)


def make_job(points: Sequence[Point], cluster_name: str, cluster: ClusterConfig, command: str) -> Job:
    """The job that trains ``points``; reserves nothing and writes nothing."""
    directories = tuple(point.directory for point in points)
    name = points[0].base_name
    sweep = directories[0].parent / f"{Path(name).name}.sweep"  # holds the script, which belongs to no single point
    used = [_last_number(directory / SLURM) for directory in directories]
    launch = f"{1 + max(used if len(points) == 1 else [*used, _last_number(sweep)]):04d}"
    directory = directories[0] / SLURM / launch if len(points) == 1 else sweep / launch
    return Job(
        name=name, cluster_name=cluster_name, cluster=cluster, num_nodes=points[0].num_nodes,
        run_directories=directories, launch=launch, directory=directory, working_directory=Path.cwd(), command=command,
    )  # fmt: skip


def _last_number(directory: Path) -> int:
    return max((int(path.name) for path in directory.glob("[0-9]*") if path.name.isdigit()), default=0)


def _command(args: argparse.Namespace) -> str:
    options = [*args.overrides, *(f"--sweep={s}" for s in args.sweep)]
    options += [f"--nodes={args.nodes}"] if args.nodes else []
    options += [f"--config-dir={args.config_dir}"] if args.config_dir else []
    return shlex.join(["hymba", "launch", "slurm", *options])


def dry_run(job: Job) -> int:
    """Print the script on stdout; on stderr what Slurm thinks of it. Returns 2 if Slurm refuses it."""
    text = render(job)
    print(text, end="", flush=True)
    if shutil.which("sbatch") is None:
        print("hymba: sbatch is not here, so Slurm has not checked this script", file=sys.stderr)
        return 0
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(text)
        file.flush()
        code, answer = _run(["sbatch", "--test-only", file.name])
    print(f"hymba: sbatch --test-only: {answer}", file=sys.stderr)
    return REFUSED if code else 0


def submit(job: Job, points: Sequence[Point]) -> int:
    """Freeze every point, write the script, hand it to sbatch; print where to look."""
    for point in points:
        _, changes = freeze_run(point.config)
        for line in changes:
            print(f"hymba: {point.config.run.name}: changed since the last start: {line}", file=sys.stderr)
    try:
        for directory in {job.directory, *(d / SLURM / job.launch for d in job.run_directories)}:
            directory.mkdir(parents=True)
        job.script_path.write_text(render(job), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror})") from error
    ids = _sbatch(job)
    facts = {
        "jobs": ids, "cluster": job.cluster_name, "command": job.command, "script": str(job.script_path),
        "submitted_at": time.time(),
    }  # fmt: skip
    for directory in job.run_directories:
        (directory / SLURM / job.launch / LAUNCH_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    _report(job, ids)
    return 0


def _sbatch(job: Job) -> list[str]:
    """Submit the script, as often as the chain is long; returns the job ids."""
    ids: list[str] = []
    for _ in range(job.cluster.restart.chain):
        after = [f"--dependency=afternotok:{ids[-1]}", "--kill-on-invalid-dep=yes"] if ids else []
        code, answer = _run(["sbatch", "--parsable", *after, str(job.script_path)])
        if code:
            had = f" (submitted already: {', '.join(ids)})" if ids else ""
            raise UserError(f"sbatch: {answer}; the script is {job.script_path}{had}")
        ids.append(answer.split()[-1].split(";")[0])
    return ids


def _run(command: list[str]) -> tuple[int, str]:
    """(exit code, what it said on one line)."""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, " ".join(f"{done.stderr} {done.stdout}".split())


def _report(job: Job, ids: list[str]) -> None:
    first, spare = job.run_directories[0], job.cluster.spare_nodes
    size = f"{job.num_nodes}{f' + {spare} spare' if spare else ''} x {job.cluster.ranks_per_node} ranks"
    log = job.directory / (f"job-{ids[0]}_0.log" if job.is_sweep else f"job-{ids[0]}.log")
    what = f"a sweep of {len(job.run_directories)}" if job.is_sweep else job.name
    print(f"job {' -> '.join(ids)}: {what} on cluster {job.cluster_name}, nodes {size}")
    for label, text in (
        ("run directory", str(first.parent if job.is_sweep else first)),
        ("messages", f"tail -F {shlex.quote(str(log))}"),
        ("curves", f"hymba runs show {first.name} --directory {shlex.quote(str(first.parent))}"),
        ("save and stop", f"touch {shlex.quote(str(first / 'stop_requested'))}"),
        ("cancel", f"scancel {' '.join(ids)}"),
    ):
        print(f"  {label:<14} {text}")


def _unreachable(points: Sequence[Point], cluster: ClusterConfig, check_paths: bool) -> list[str]:
    """Paths that the job needs and its nodes would not see."""
    problems = []
    if cluster.venv and check_paths and not Path(cluster.venv, "bin", "activate").is_file():
        problems.append(f"cluster.venv={cluster.venv}: no bin/activate there; give a virtual environment")
    if not cluster.container.image:
        return problems
    image = cluster.container.image
    if image.endswith(".sqsh") and check_paths and not Path(image).is_file():
        problems.append(f"cluster.container.image={image}: no such file")
    same = [Path(m.split(":")[0]) for m in cluster.container.mounts if m.split(":")[0] == m.split(":")[1]]
    for point in points:
        needed = {"the working directory": Path.cwd(), "run.directory": point.directory}
        if point.config.data.path and "://" not in point.config.data.path:
            needed["data.path"] = Path(point.config.data.path).absolute()
        for key, path in needed.items():
            if not any(path.is_relative_to(mount) for mount in same):
                problems.append(
                    f"cluster.container.mounts: none makes {key} {path} visible under its own path; add {path}:{path}"
                )
    return problems


def _refuse_second_job(directory: Path) -> None:
    """Two jobs in one run directory would overwrite each other. Raises UserError."""
    for launch in launches(directory):
        for job_id in map(str, launch.get("jobs", [])):
            if (job := in_queue(job_id)) is not None:
                raise UserError(
                    f"{directory}: job {job[0]} of this run is {job[1]}; wait for it, scancel {job_id}, or choose "
                    "another run.name"
                )
