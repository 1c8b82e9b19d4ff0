"""``hymba launch local``: one machine, through torchrun, started again after failures."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from hymba_train.checkpoint import directory as checkpoints
from hymba_train.config import FROZEN_NAME, freeze_run
from hymba_train.errors import UserError
from hymba_train.exit_codes import GUARD_STOP, INTERRUPTED, STOPPED_EARLY
from hymba_train.outcome import clear, read_outcome, request_stop
from launch.cluster import ClusterConfig
from launch.points import make_points

FAILED = 1
NO_PROGRESS_LIMIT = 3


def run_local(args: argparse.Namespace) -> int:
    """The verb; returns the exit code. Raises UserError."""
    if args.nproc is not None and args.nproc < 1:
        raise UserError(f"--nproc {args.nproc}: give at least 1")
    if args.max_restarts < 0:
        raise UserError(f"--max-restarts {args.max_restarts}: give at least 0")
    clusters = [override for override in args.overrides if override.startswith("cluster")]
    if clusters:
        raise UserError(f"{clusters[0]}: this machine needs no cluster; use hymba launch slurm, or leave it out")
    num_processes = args.nproc or num_gpus() or 1
    machine = ClusterConfig(gpus_per_node=0, processes_per_node=num_processes)
    (point,) = make_points(args.overrides, [], machine, 1, args.config_dir, check_paths=True)
    command = torchrun_command(num_processes, point.directory / FROZEN_NAME)
    if args.dry_run:
        print(shlex.join(command))
        return 0
    _, changes = freeze_run(point.config)
    for line in changes:
        print(f"hymba: changed since the last start: {line}", file=sys.stderr)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    return supervise(command, point.directory, args.max_restarts)


def num_gpus() -> int:
    """GPUs of this machine, without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip()])
    if shutil.which("nvidia-smi") is None:
        return 0
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines()) if done.returncode == 0 else 0


def torchrun_command(num_processes: int, resolved: Path) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}",
        "--max-restarts=0", "-m", "hymba_train", "train", "--frozen", str(resolved),
    ]  # fmt: skip


def supervise(
    command: list[str], run_directory: Path, max_restarts: int, say: Callable[[str], None] | None = None
) -> int:
    """Run ``command`` until the run has finished or was stopped; start again after a failure.

    The first Ctrl-C, SIGTERM or SIGUSR1 asks training to save and stop; a second one ends it at once. Returns 0
    (finished), 75 (stopped early), 76 (ended by a guard), 1 (failed more than ``max_restarts`` times, or without
    progress) or 130.
    """
    say = say or (lambda text: print(f"hymba: {text}", file=sys.stderr, flush=True))
    starts: list[str] = []
    for attempt in range(max_restarts + 1):
        newest, _ = checkpoints.newest(run_directory / checkpoints.CHECKPOINTS)
        starts.append(newest.name if newest else "none")
        if len(starts) > NO_PROGRESS_LIMIT and len(set(starts[-NO_PROGRESS_LIMIT - 1 :])) == 1:
            say(f"giving up: {NO_PROGRESS_LIMIT} starts in a row from checkpoint {starts[-1]} brought no new one")
            return FAILED
        clear(run_directory)
        code, num_signals = _run(command, run_directory, say)
        outcome = read_outcome(run_directory)
        if outcome is not None:
            if outcome.finished:
                return 0
            if outcome.failed:
                say(f"ended by a guard at step {outcome.step}: {outcome.reason}")
                return GUARD_STOP
            say(f"saved and stopped at step {outcome.step}: {outcome.reason}; start again to go on")
            return STOPPED_EARLY
        if num_signals:
            return INTERRUPTED
        left = max_restarts - attempt
        say(f"training failed (exit code {code}); " + (f"starting again, {left} more" if left else "no restarts left"))
    return FAILED


def _kill(pid: int) -> None:
    """Kill a process and all below it; torchrun's ranks are in sessions of their own and would outlive it."""
    try:
        parent = psutil.Process(pid)
        doomed = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for process in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _run(command: list[str], run_directory: Path, say: Callable[[str], None]) -> tuple[int, int]:
    """(exit code, number of signals that came meanwhile)."""
    child: subprocess.Popen | None = None
    caught = 0

    def on_signal(number: int, frame: object) -> None:
        nonlocal caught
        caught += 1
        if caught == 1:
            say(f"{signal.Signals(number).name}: training saves and stops after this step; once more ends it at once")
            request_stop(run_directory, f"signal {signal.Signals(number).name}")
        elif child is not None:
            _kill(child.pid)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        # In a session of its own: Ctrl-C goes to every process in the terminal's group, and torchrun would die of it.
        # And with a store of its own for every restart of torchrun: in a shared one, a restarted rank would find the
        # addresses of dead ones.
        environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **os.environ}
        child = subprocess.Popen(command, start_new_session=True, env=environment)
        return child.wait(), caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if child is not None and child.poll() is None:
            _kill(child.pid)
