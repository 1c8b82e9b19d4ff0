"""The process beside each rank that notices when the rank no longer moves. Standard library only, no torch.

A rank that is stopped, or that holds the interpreter lock, cannot say so itself; this process can, and can end it. It
sleeps half a second at a time and reads 48 bytes of shared memory. Only when a rank has stood still for too long does
it touch the run directory::

    <run>/hangs/<start>/            made by the first monitor that finds its rank late; the others see it and report
    <run>/hangs/<start>/rank_00001.json, .txt   what is known about the rank, stacks of all its threads
    <run>/hangs/<start>/verdict.txt  who is guilty

Then every monitor ends its own rank. It ends with its rank, however that ends.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from hymba_train.checkpoint.children import die_with
from hymba_train.guards import hang, marks, stacks

TICK_SECONDS = 0.5
LONGEST_TICK_SECONDS = 2.0  # of a machine that slept meanwhile no more than this counts
SECONDS_FOR_REPORTS = 3.0
SECONDS_FOR_A_DUMP = 1.0
SECONDS_TO_OBEY = 1.5
SECONDS_IN_ALL = 15.0  # then the rank is ended whatever the file system does
DUMP_SIGNAL = signal.SIGUSR2


class Monitor:
    """Args:
    facts: pid, rank, world_size, main_thread (ident), fast_seconds, slow_seconds, exit_code, directory (of this
        start's hangs); descriptors marks_fd and stacks_fd.
    """

    def __init__(self, facts: dict) -> None:
        self.facts = facts
        self.pid, self.rank = facts["pid"], facts["rank"]
        self.directory = Path(facts["directory"])
        self.marks = marks.Marks(facts["marks_fd"])
        self._still = {"count": 0.0, "beat": 0.0}  # seconds since the field changed
        self._seen = {field: self.marks.get(field) for field in self._still}

    def run(self) -> None:
        """Until the rank has ended."""
        before = time.monotonic()
        while os.getppid() == self.pid:
            time.sleep(TICK_SECONDS)
            now = time.monotonic()
            self._look(min(now - before, LONGEST_TICK_SECONDS))
            before = now
            if self._is_late() or self._others_ask():
                self.investigate()
                return

    def _look(self, seconds: float) -> None:
        for field in self._still:
            value = self.marks.get(field)
            self._still[field] = self._still[field] + seconds if value == self._seen[field] else 0.0
            self._seen[field] = value

    def _is_late(self) -> bool:
        fast = self.marks.get("activity") in marks.FAST
        return self._still["count"] > self.facts["fast_seconds" if fast else "slow_seconds"]

    def _others_ask(self) -> bool:
        """Looked up only while this rank stands still for longer than usual: a file system has better things to do."""
        return self._still["count"] > min(10.0, self.facts["fast_seconds"] / 2) and self.directory.is_dir()

    def investigate(self) -> None:
        """Report, wait for the other reports, tell who is guilty, end the rank."""
        last_resort = threading.Timer(SECONDS_IN_ALL, self._kill)
        last_resort.daemon = True
        last_resort.start()
        with contextlib.suppress(OSError):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._write_report()
            reports = self._collect()
            if self.rank == min(reports, default=self.rank):
                self._tell(list(reports.values()))
        self.end_rank()

    def _write_report(self) -> None:
        dump = self._dump()
        frames = stacks.threads(dump).get(self.facts["main_thread"], [])
        report = hang.Report(
            rank=self.rank, host=socket.gethostname(), pid=self.pid, process_state=process_state(self.pid),
            step=self.marks.get("step"), activity=self.marks.get("activity"), seconds=self._still["count"],
            seconds_without_beat=self._still["beat"], collectives=self.marks.get("collectives"),
            frames=tuple(frames[:20]), waiting=stacks.is_waiting(frames),
        )  # fmt: skip
        name = f"rank_{self.rank:05d}"
        text = dump or f"rank {self.rank} did not answer: {hang.cannot_answer(report) or 'no reason known'}\n"
        (self.directory / f"{name}.txt").write_text(text, encoding="utf-8")
        temporary = self.directory / f".{name}.json"
        temporary.write_text(json.dumps(report.to_dict()), encoding="utf-8")
        os.replace(temporary, self.directory / f"{name}.json")

    def _dump(self) -> str:
        """Stacks of all threads of the rank: faulthandler writes them from a signal handler in C, GIL or not."""
        descriptor = self.facts["stacks_fd"]
        before = os.fstat(descriptor).st_size
        try:
            os.kill(self.pid, DUMP_SIGNAL)
        except ProcessLookupError:
            return ""
        deadline = time.monotonic() + SECONDS_FOR_A_DUMP
        size = before
        while time.monotonic() < deadline:
            time.sleep(0.05)
            last, size = size, os.fstat(descriptor).st_size
            if size > before and size == last:
                break
        return os.pread(descriptor, size - before, before).decode("utf-8", "replace")

    def _collect(self) -> dict[int, hang.Report]:
        deadline = time.monotonic() + SECONDS_FOR_REPORTS
        reports: dict[int, hang.Report] = {}
        while True:
            for path in self.directory.glob("rank_*.json"):
                rank = int(path.stem.removeprefix("rank_"))
                if rank not in reports:
                    reports[rank] = hang.Report.from_dict(json.loads(path.read_text(encoding="utf-8")))
            if len(reports) == self.facts["world_size"] or time.monotonic() > deadline:
                return reports
            time.sleep(0.1)

    def _tell(self, reports: list[hang.Report]) -> None:
        text = hang.verdict(reports, self.facts["world_size"])
        path = self.directory / "verdict.txt"
        path.write_text(text + "\n", encoding="utf-8")
        lines = [f"hymba: hang: {line}" for line in text.splitlines()]
        print("\n".join([*lines, f"hymba: hang: stacks of the ranks: {self.directory}"]), file=sys.stderr, flush=True)

    def end_rank(self) -> None:
        """Ask the rank to exit with its code; kill it if it cannot."""
        self.marks.set("order", self.facts["exit_code"])
        deadline = time.monotonic() + SECONDS_TO_OBEY
        while time.monotonic() < deadline and os.getppid() == self.pid:
            time.sleep(0.05)
        self._kill()

    def _kill(self) -> None:
        if os.getppid() == self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def process_state(pid: int) -> str:
    """One letter of /proc/PID/stat; '?' where there is none."""
    try:
        # The name in parentheses may hold anything, so the state is what follows the last one.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "?"


def main() -> None:
    """Watch the rank of which the command line tells, until one of the two ends."""
    facts = json.loads(sys.argv[1])
    # What ends or stops the rank's process group is not meant for its monitor: the rank may want to save first.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    die_with(facts["pid"])
    Monitor(facts).run()
