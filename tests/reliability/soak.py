"""R20: a long training to which things keep happening, and whose log must be that of an undisturbed one.

python -m tests.reliability.soak DIRECTORY [--minutes 30] [--seed 1] [--ranks 2] [--every 20]

Every EVERY seconds or so something drawn from FAULTS happens. The training is started again each time, as a launcher
would. At the end the merged log (loss, gradient norm, batch hash; last line about a step) is held to an undisturbed
run's of as many steps, and numbers of descriptors, memory and shared memory of the last start to those of the first.
Exits with 1 if anything differs. Leaves soak.json and goodput.png in DIRECTORY.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil

from hymba_train.callbacks.jsonl import read_events
from hymba_train.checkpoint import directory as checkpoints
from hymba_train.exit_codes import STOPPED_EARLY
from hymba_train.figures import pyplot
from hymba_train.outcome import read_outcome, request_stop
from tests.children import forks_of, has_ended
from tests.reliability.test_integrity import flip
from tests.train.tiny_run import write_data
from tests.warm import Warm

LAYOUT = {f"parallel__{k}": True for k in ("distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")}
SAVES = {"checkpoint__save_interval": 50, "checkpoint__keep_last": 3, "checkpoint__async_save": True}
QUIET = {"logging__eval_interval": 0, "logging__batch_hash": True}
MOST_MEMORY_GROWTH = 1.15  # of a rank, last start to first
STARTS_WITHOUT_FAULT = 2  # at the end: nothing that happened may show
ENDLESS = """
from hymba_train.config.schema import PhaseConfig
import tests.train.tiny_run as t
original = t.tiny_config
def endless(directory, **changes):
    config = original(directory, **changes)
    config.data.phases = {"only": PhaseConfig(tokens=1 << 40, seq_length=16, global_batch_size=4, micro_batch_size=2,
                                              blend={"odd": 0.7, "even": 0.3})}
    return config
t.tiny_config = endless
"""


class Soak:
    def __init__(self, path: Path, seed: int, ranks: int, every: float) -> None:
        self.path, self.rng, self.ranks, self.every = path, random.Random(seed), ranks, every
        self.run = path / "runs" / "soak"
        self.warm = Warm()
        self.faults: list[dict] = []
        self.starts: list[dict] = []
        self.usage: list[dict] = []

    # -- faults: each leaves a training that has ended, or is about to ------------------------------------------------

    def kill_a_rank(self) -> None:
        os.kill(self.rng.choice(self.warm.pids), signal.SIGKILL)

    def kill_all_ranks(self) -> None:
        for pid in self.warm.pids:
            os.kill(pid, signal.SIGKILL)

    def kill_a_writer(self) -> None:
        """One whose death ends the training: a writer that has just published is missed by nobody."""
        ranks = [psutil.Process(pid) for pid in self.warm.pids]
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for rank in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    for writer in forks_of(rank)[:1]:
                        writer.kill()
                        time.sleep(1)
                if has_ended(rank):
                    return
            time.sleep(0.002)
        self.kill_a_rank()

    def terminate_a_rank(self) -> None:
        os.kill(self.rng.choice(self.warm.pids), signal.SIGTERM)

    def user_signal_to_a_rank(self) -> None:
        os.kill(self.rng.choice(self.warm.pids), signal.SIGUSR1)

    def stop_file(self) -> None:
        request_stop(self.run, "soak")

    def damage_newest(self) -> None:
        """After the end: a flipped bit in the newest checkpoint, if there is an older one."""
        self.kill_all_ranks()
        self._after = self._flip

    def tear_pointer(self) -> None:
        self.kill_all_ranks()
        self._after = lambda: (self.run / "checkpoints" / "latest").write_text(self.rng.choice(["", "\0", "step_1"]))

    FAULTS = (
        kill_a_rank, kill_all_ranks, kill_a_writer, terminate_a_rank, user_signal_to_a_rank, stop_file, damage_newest,
        tear_pointer,
    )  # fmt: skip

    def _flip(self) -> None:
        complete = checkpoints.complete_steps(self.run / "checkpoints")
        if len(complete) > 1:
            file = self.rng.choice(sorted(complete[-1].glob("*.distcp")))
            flip(file, self.rng.randrange(file.stat().st_size), self.rng.randrange(8))

    # -- the run ------------------------------------------------------------------------------------------------------

    def step(self) -> int:
        lines = (self.run / "metrics.jsonl").read_bytes().splitlines() if (self.run / "metrics.jsonl").exists() else []
        for line in reversed(lines):
            try:
                return json.loads(line).get("step", 0)
            except ValueError:
                continue
        return 0

    def go(self, fault) -> None:
        """One start, and what ends it."""
        self._after = lambda: None
        begin = time.time()
        self.warm.start(self.run, ranks=self.ranks, patch=ENDLESS, **SAVES, **QUIET, **LAYOUT)
        time.sleep(self.every * self.rng.uniform(0.5, 1.5))
        self.usage.append(usage(self.warm.pids))
        at = self.step()
        fault(self)
        codes, output = self.warm.finish()
        self._after()
        stopped = fault.__name__ in ("terminate_a_rank", "user_signal_to_a_rank", "stop_file")
        expected = codes == [STOPPED_EARLY] * self.ranks if stopped else any(codes)
        newest, _ = checkpoints.newest(self.run / "checkpoints")
        record = {
            "fault": fault.__name__, "begin": begin, "end": time.time(), "step": self.step(), "at": at, "codes": codes,
            "resumes_from": checkpoints.step_of(newest) if newest else 0, "as_expected": expected,
        }  # fmt: skip
        self.starts.append(record)
        print(f"{fault.__name__} at step {at}: codes {codes}, newest {record['resumes_from']}"
              + ("" if expected else f"  NOT AS EXPECTED\n{output[-3000:]}"), flush=True)  # fmt: skip

    def compare(self) -> list[str]:
        """Problems of the log."""
        steps = merged(self.run)
        last = max(steps)
        reference = self.path / "runs" / "undisturbed"
        self.warm.start(reference, ranks=self.ranks, patch=ENDLESS, run__train_steps=last, **SAVES, **QUIET, **LAYOUT)
        codes, output = self.warm.finish()
        if any(codes):
            return [f"the undisturbed run failed: {output[-2000:]}"]
        expected = merged(reference)
        different = [step for step in expected if steps.get(step) != expected[step]]
        problems = [f"{len(different)} of {last} steps differ, the first is {different[0]}"] if different else []
        problems += [f"after {s['fault']}: codes {s['codes']}" for s in self.starts if not s["as_expected"]]
        return problems + self.growth()

    def growth(self) -> list[str]:
        """What the last start uses more than the first; both have trained about as long."""
        first, last, problems = self.usage[0], self.usage[-1], []
        if last["descriptors"] > first["descriptors"] + 2:
            problems.append(f"descriptors grew: {first['descriptors']} to {last['descriptors']}")
        if last["memory"] > first["memory"] * MOST_MEMORY_GROWTH:
            problems.append(f"memory grew: {first['memory']} to {last['memory']} bytes")
        if last["shared"] > first["shared"]:
            problems.append(f"/dev/shm grew: {first['shared']} to {last['shared']} files")
        leftovers = [p.name for p in self.run.joinpath("checkpoints").iterdir() if "." in p.name]
        return problems + ([f"leftovers: {leftovers}"] if len(leftovers) > 2 else [])


def usage(pids: list[int]) -> dict[str, int]:
    """Of the rank that uses most."""
    processes = [psutil.Process(pid) for pid in pids]
    return {
        "descriptors": max(p.num_fds() for p in processes),
        "memory": max(p.memory_info().rss for p in processes),
        "shared": len(os.listdir("/dev/shm")),
    }


def merged(run: Path) -> dict[int, tuple]:
    """Step -> what must be equal, from the last line about it."""
    return {
        r["step"]: (r["loss_hex"], r["grad_norm_hex"], r["batch_hash"], r["tokens"])
        for r in read_events(run / "metrics.jsonl", "train")
    }


def goodput(starts: list[dict], run: Path) -> tuple[list[float], list[float]]:
    """(minutes since the beginning at each start's end, share of the time by then that went into steps that count).

    A step counts in the start that has done it last.
    """
    done_in: dict[int, tuple[int, float]] = {}
    number = -1
    for text in (run / "metrics.jsonl").read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # torn by a kill
            continue
        if line["event"] == "start":
            number += 1
        elif line["event"] == "train":
            done_in[line["step"]] = number, line["step_seconds"]
    useful = [sum(seconds for n, seconds in done_in.values() if n == i) for i in range(number + 1)]
    begin = starts[0]["begin"]
    minutes = [(start["end"] - begin) / 60 for start in starts]
    kept = list(itertools.accumulate(useful))
    return minutes, [k / (60 * m) for k, m in zip(kept, minutes, strict=False)]


def plot(soak: Soak, path: Path) -> float:
    minutes, shares = goodput(soak.starts, soak.run)
    figure, axes = pyplot().subplots(figsize=(8, 4))
    axes.plot(minutes, shares)
    for start in soak.starts:
        axes.axvline((start["end"] - soak.starts[0]["begin"]) / 60, color="0.8", linewidth=0.8, zorder=0)
    axes.set(xlabel="minutes", ylabel="goodput: kept step time / time", ylim=(0, 1), title=f"{len(soak.starts)} faults")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return shares[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--every", type=float, default=20, help="seconds between faults, on average")
    arguments = parser.parse_args()
    path = arguments.directory.absolute()
    shutil.rmtree(path / "runs", ignore_errors=True)
    write_data(path)
    soak = Soak(path, arguments.seed, arguments.ranks, arguments.every)
    end = time.monotonic() + 60 * arguments.minutes
    try:
        while time.monotonic() < end:
            soak.go(soak.rng.choice(Soak.FAULTS))
        for _ in range(STARTS_WITHOUT_FAULT):
            soak.go(Soak.stop_file)
        outcome = read_outcome(soak.run)
        problems = soak.compare()
        share = plot(soak, path / "goodput.png")
    finally:
        soak.warm.close()
    result = {
        "seed": arguments.seed, "minutes": arguments.minutes, "ranks": arguments.ranks, "faults": len(soak.starts),
        "steps": outcome.step if outcome else None, "goodput": share, "problems": problems, "usage": soak.usage,
        "starts": soak.starts,
    }  # fmt: skip
    (path / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{result['faults']} faults, {result['steps']} steps, goodput {share:.1%}; " + ("; ".join(problems) or "exact")
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
