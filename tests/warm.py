"""Ranks that start in a fraction of a second: forks of one process that has imported everything.

As a script it is that process: it reads a job a line (JSON) and answers with the pids of its forks, one a rank, then
with their exit codes (negative: the signal). When a rank has failed and others live on, they are killed after a while,
as torchrun does. :class:`Warm` is the other end, :func:`server` the one that all tests share. A job is a module, as
``python -m`` runs it, or a tiny training; the latter may pause a process before it saves, so that strace can be
attached and sees nothing but the save.

A fork of a process that has touched CUDA cannot use it, and which import touches it is not ours to say. On GPUs the
ranks are therefore no forks but processes of their own, some of which are started ahead, import everything, and wait.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tests.children import ROOT, child_environment
from tests.device import NUM_GPUS, ON_GPUS, patience, training_variables

LAUNCHER = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
ATTACHED_SECONDS = patience(60)
# NCCL does not notice the death of a rank on the same machine: the others wait until somebody ends them.
GRACE_SECONDS = 10 if ON_GPUS else 30
STARTED_AHEAD = 2 * NUM_GPUS


class Warm:
    """The server process. ``run`` runs a module in forks of it, ``train`` one training."""

    def __init__(self) -> None:
        self._is_running = False
        env = child_environment(**training_variables())
        env = {k: v for k, v in env.items() if k not in LAUNCHER}  # this process may be a group of one
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"], cwd=ROOT, env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, ranks: int, module: str, *arguments: str, timeout_seconds: float) -> str:
        """Output of ``python -m module`` on so many ``ranks`` (0: one that no launcher has started). Fails the test if
        one does not exit with 0, or has not after ``timeout_seconds``."""
        with tempfile.TemporaryDirectory() as place:
            self._begin(Path(place) / "output", ranks=ranks, module=module, arguments=arguments)
            timer = threading.Timer(patience(timeout_seconds), self._kill)
            timer.start()
            codes, output = self.finish()
            timer.cancel()
        assert not any(codes), f"{module} exited with {codes} (-9: after {timeout_seconds} s at most)\n{output}"
        return output

    def train(self, directory: Path, *, pause: str | None = None, on_pause=None, patch: str = "", **changes):
        """(exit code, output) of a tiny run of one rank in ``directory``, ROOT/runs/NAME with data in ROOT.

        ``pause``: training or writer waits before it saves, and ``on_pause`` is called with its pid. ``patch``: Python
        code that the fork runs first, to break something. ``changes``: group__key=value.
        """
        self.start(directory, pause=pause, patch=patch, **changes)
        if pause:
            wait_for(directory / "ready", self._process)
            on_pause(int((directory / "ready").read_text()))
            (directory / "go").touch()
        (code,), output = self.finish()
        return code, output

    def start(self, directory: Path, *, ranks: int = 0, pause: str | None = None, patch: str = "", **changes) -> None:
        """Begin a run; ``pids`` are then its ranks'. One at a time."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("ready", "go"):
            (directory / name).unlink(missing_ok=True)
        self._begin(
            directory / "output", ranks=ranks, directory=str(directory), pause=pause, patch=patch, changes=changes
        )

    def _begin(self, log: Path, **job) -> None:
        self._abandon()
        self._log = log
        self._process.stdin.write(json.dumps({"log": str(log), **job}) + "\n")
        self._process.stdin.flush()
        self.pids: list[int] = json.loads(self._process.stdout.readline())
        self._is_running = True

    def _abandon(self) -> None:
        """End what a test that failed has left running, whose answer would be taken for the next one's."""
        if self._is_running:
            self._kill()
            self.finish()

    def _kill(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def finish(self) -> tuple[list[int], str]:
        """(exit codes by rank, output of all) of the run that was started."""
        codes = json.loads(self._process.stdout.readline())
        self._is_running = False
        return codes, self._log.read_text(errors="replace")

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:  # a test has failed while a job was paused
            self._kill()
            self._process.wait(20)
        self._process.stdout.close()


@functools.cache
def server() -> Warm:
    """The one of this process, which ends with it."""
    warm = Warm()
    atexit.register(warm.close)
    return warm


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + ATTACHED_SECONDS
    while not (path.exists() and path.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.005)


class Strace:
    """strace on one process, not on its forks, until that process ends."""

    CALLS = (
        "openat,write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat,rmdir,ftruncate"
    )

    def __init__(self, output: Path, inject: str = "") -> None:
        self.output, self.inject = output, inject

    def attach(self, pid: int) -> None:
        command = ["strace", "-y", "-e", f"trace={self.CALLS}", "-o", str(self.output), "-p", str(pid)]
        if self.inject:
            command += ["-e", f"inject={self.inject}"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        line = self._process.stderr.readline()
        assert "attached" in line, line

    def calls(self) -> list[str]:
        """The calls that it saw; waits for strace to end."""
        self._process.wait(60)
        self._process.stderr.close()
        return [line for line in self.output.read_text(errors="replace").splitlines() if "(" in line]


def why_no_strace() -> str:
    """Empty if strace works here."""
    try:
        done = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return "strace is not installed (Debian: apt-get install strace): NO crash point inside a save was tried"
    return done.stderr.strip() and f"strace may not trace here ({done.stderr.strip()}): NO crash point was tried"


def _pause(directory: Path) -> None:
    ready = directory / "ready.part"
    ready.write_text(str(os.getpid()))
    ready.rename(directory / "ready")
    while not (directory / "go").exists():
        time.sleep(0.005)


def _pause_before(who: str, directory: Path) -> None:
    from hymba_train.checkpoint import save

    owner, name = {"training": (save.CheckpointWriter, "save"), "writer": (save, "write_share")}[who]
    original = getattr(owner, name)

    def paused(*args, **kwargs):
        setattr(owner, name, original)  # once
        _pause(directory)
        return original(*args, **kwargs)

    setattr(owner, name, paused)


def _train(job: dict) -> int:
    from hymba_train.errors import UserError
    from hymba_train.train import main as training
    from tests.train import tiny_run

    logging.basicConfig(level=logging.WARNING)
    directory = Path(job["directory"])
    exec(job["patch"], {})
    if job["pause"]:
        _pause_before(job["pause"], directory)
    config = tiny_run.tiny_config(directory.parents[1], **{"run.name": directory.name})
    for key, value in job["changes"].items():
        group, _, leaf = key.partition("__")
        setattr(getattr(config, group), leaf, value)
    try:
        return training.train(config, tiny_run.tiny_plan(config))
    except UserError as error:
        print(f"UserError: {error}", flush=True)
        return 2


def _run_module(job: dict) -> int:
    sys.argv = [job["module"], *job["arguments"]]
    try:
        runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _fork(job: dict, rank: int, port: int) -> int:
    return os.fork() or _be_rank(job, rank, port)


class _Ahead:
    """Processes of this module that have imported everything, or are about to, and wait for their job."""

    def __init__(self) -> None:
        self._waiting: list[subprocess.Popen] = []
        self._used: list[subprocess.Popen] = []  # kept: Popen would wait for one that is forgotten, and take its code
        self.fill()

    def fill(self) -> None:
        while len(self._waiting) < STARTED_AHEAD:
            command = [sys.executable, "-m", "tests.warm", "rank"]
            # Standard output is for the answers.
            self._waiting.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr, text=True))

    def start(self, job: dict, rank: int, port: int) -> int:
        process = self._waiting.pop(0)
        self._used.append(process)
        process.stdin.write(json.dumps([job, rank, port]) + "\n")
        process.stdin.close()
        return process.pid


def _wait_for_job() -> None:
    import hymba_train.train.main  # noqa: F401  what takes long

    line = sys.stdin.readline()
    if line:  # else nobody wants it any more
        _be_rank(*json.loads(line))


def _be_rank(job: dict, rank: int, port: int) -> NoReturn:
    code = 1
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if job["ranks"]:
            os.environ.update(
                RANK=str(rank), WORLD_SIZE=str(job["ranks"]), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )  # fmt: skip
        code = _run_module(job) if "module" in job else _train(job)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pids: list[int]) -> list[int]:
    codes: dict[int, int] = {}
    deadline = None
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(found[1])
        if deadline is None and any(codes.values()):
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def _how_to_start() -> tuple[Callable[[dict, int, int], int], Callable[[], None]]:
    """(what starts a rank of a job and returns its pid, what prepares for the next job)."""
    if ON_GPUS:
        ahead = _Ahead()
        return ahead.start, ahead.fill
    import torch

    import hymba_train.train.main  # noqa: F401  what takes long

    torch.set_num_threads(1)
    return _fork, lambda: None


def main() -> None:
    start, prepare = _how_to_start()
    for line in sys.stdin:
        job = json.loads(line)
        Path(job["log"]).unlink(missing_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        pids = [start(job, rank, port) for rank in range(max(job["ranks"], 1))]
        print(json.dumps(pids), flush=True)
        prepare()
        print(json.dumps(_wait(pids)), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["rank"]:
        _wait_for_job()
    else:
        main()
