"""What a checkpoint costs: stall of training for background and foreground saves, seconds per GB, and loading.

python -m benchmarks.checkpoint_stall [--model hymba_tiny] [--steps 20] [--directory DIR] [override ...]

One process, or several under torchrun; CPU or GPU, whichever is there; random data. DIR is where checkpoints go: the
disk that is measured. Prints a table and a line of JSON. On one GPU: --model hymba_1p5b precision=bf16.

Stall of a background save: how much longer the steps from the save to its publication took, all together, than as many
undisturbed ones, the call itself included. Loading is measured from a cold page cache (posix_fadvise), once as a start
does it (verify, then load) and once without verification.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from hymba_train.callbacks.base import Callback
from hymba_train.checkpoint import manifest, together
from hymba_train.checkpoint.load import Source, load_checkpoint
from hymba_train.config import compose
from hymba_train.plan import make_plan
from hymba_train.train import main as training

WARM_UP_STEPS = 5
SAVES = 3  # of each kind


class Probe(Callback):
    """Saves in the background at some steps, then in the foreground, then loads; ``result`` has the seconds."""

    def __init__(self, config, writer, num_steps: int) -> None:
        self.config, self.writer, self.num_steps = config, writer, num_steps
        self.plain: list[float] = []
        self.result: dict[str, float] = {}
        self._stalls: list[float] = []
        self._calls: list[float] = []
        self._background: list[float] = []
        self._since: float | None = None  # time of the save under way
        self._steps_under_way = 0
        self._last = 0.0

    def on_train_start(self, loop) -> None:
        self._last = _now()

    def on_step_end(self, loop, metrics) -> None:
        now = _now()
        step, seconds = loop.state.step, now - self._last
        published = self.writer.poll(sums=loop.answers)
        if WARM_UP_STEPS < step <= WARM_UP_STEPS + self.num_steps:
            self.plain.append(seconds)
        elif self._since is not None:
            self._steps_under_way += 1
            if published:
                undisturbed = self._steps_under_way * statistics.median(self.plain)
                self._stalls.append(_now() - self._since - undisturbed)
                self._background.append(_now() - self._since)
                self._since = None
        if step > WARM_UP_STEPS + self.num_steps and self._since is None and len(self._stalls) < SAVES:
            begin = _now()
            self.writer.save(loop.state.to_dict())
            self._calls.append(_now() - begin)
            self._since, self._steps_under_way = begin, 0
        if len(self._stalls) == SAVES:
            loop.request_stop("measured")
        self._last = _now()

    def on_train_end(self, loop) -> None:
        self.writer.poll(wait=True)
        foreground, path = [], None
        for number in range(SAVES):
            begin = _now()
            self.writer.save({**loop.state.to_dict(), "step": loop.state.step + 1 + number}, wait=True)
            foreground.append(_now() - begin)
            (path,) = self.writer.poll()
        num_bytes = sum(p.stat().st_size for p in path.iterdir())
        self.result = {
            "gigabytes": num_bytes / 1e9,
            "step": statistics.median(self.plain),
            "background_call": statistics.median(self._calls),
            "background_stall": statistics.median(self._stalls),
            "background_stall_worst": max(self._stalls),
            "background_to_published": statistics.median(self._background),
            "foreground": statistics.median(foreground),
            "load": self._load(path, verify=False),
            "verify_and_load": self._load(path, verify=True),
        }

    def _load(self, path: Path, verify: bool) -> float:
        """Median seconds from a cold page cache."""
        seconds = []
        for _ in range(SAVES):
            _forget(path)
            dist.barrier()
            begin = _now()
            if verify:
                assert together.verify(path) == []
            w = self.writer
            load_checkpoint(Source(path, False), self.config, w.runtime, w.chunks, w.optimizer)
            seconds.append(_now() - begin)
        return statistics.median(seconds)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _forget(path: Path) -> None:
    manifest._verified.clear()
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def write_data(directory: Path, vocab_size: int) -> None:
    """A tokenizer of that many words and a source of random ones."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    from hymba_train.data.indexed_writer import IndexedWriter

    words = {"</s>": 0, **{f"w{i}": i for i in range(1, vocab_size)}}
    Tokenizer(WordLevel(words, unk_token="</s>")).save(str(directory / "tokenizer.json"))
    with IndexedWriter(directory / "random", np.uint16) as writer:
        tokens = np.random.default_rng(0).integers(1, vocab_size, size=(500, 2000)).astype(np.uint16)
        tokens[:, -1] = 0
        for document in tokens:
            writer.add_documents(document, np.array([len(document)]))
        writer.publish()


def configuration(arguments: argparse.Namespace, directory: Path):
    batch = int(os.environ.get("WORLD_SIZE", 1)) * arguments.micro_batch_size
    phase = (
        f"{{tokens: 64000000, seq_length: {arguments.seq_length}, global_batch_size: {batch}, blend: {{random: 1}}, "
    )
    phase += f"micro_batch_size: {arguments.micro_batch_size}}}"
    return compose(
        ["experiment=demo", f"model={arguments.model}", f"data.path={directory}", "data.tokenizer=tokenizer.json",
         "~data.sources.books", "~data.sources.speeches", "~data.sources.docs", "~data.sources.code",
         "data.sources.random={path: random}", "~data.phases.stable", "~data.phases.long", f"data.phases.only={phase}",
         f"run.directory={directory}", "run.name=stall", "checkpoint.keep_last=2", *arguments.overrides]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hymba_tiny")
    parser.add_argument("--steps", type=int, default=20, help="undisturbed steps to compare with")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--directory", type=Path, help="where to write; a temporary one if left out")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    rank = int(os.environ.get("RANK", 0))
    with tempfile.TemporaryDirectory(dir=arguments.directory) as own:
        directory = Path(os.environ.setdefault("STALL_DIRECTORY", own))  # under torchrun give one for all ranks
        if rank == 0:
            write_data(directory, compose(["experiment=demo", f"model={arguments.model}"]).model.vocab_size)
        config = configuration(arguments, directory)
        probes: list[Probe] = []

        def build(config, directory, runtime, steps, peak, writer, *others):
            probes.append(Probe(config, writer, arguments.steps))
            return list(probes)

        training.build_callbacks = build
        training.shutdown = lambda: None
        training.train(config, make_plan(config, int(os.environ.get("WORLD_SIZE", 1)), check_paths=False))
        if rank == 0:
            report(probes[0].result, arguments.model)
        dist.barrier()


def report(result: dict[str, float], model: str) -> None:
    gb, step = result["gigabytes"], result["step"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, load {os.getloadavg()[0]:.1f}"
    print(f"{model} on {device}: checkpoints of {gb:.3f} GB, steps of {step:.3f} s; medians of {SAVES}\n")
    print("| what | seconds | seconds per GB | share of 100 steps |\n|---|---:|---:|---:|")
    rows = [
        ("stall of a background save", "background_stall"), ("of that, in the call", "background_call"),
        ("background save, until published", "background_to_published"), ("foreground save", "foreground"),
        ("load, without verification", "load"), ("verify and load", "verify_and_load"),
    ]  # fmt: skip
    for name, key in rows:
        share = f"{result[key] / (100 * step):.2%}" if key in ("background_stall", "foreground") else "-"
        print(f"| {name} | {result[key]:.3f} | {result[key] / gb:.2f} | {share} |")
    print(f"\nverification takes {1 - result['load'] / result['verify_and_load']:.1%} of a start's reading")
    print(json.dumps({"model": model, "device": device, **result}))


if __name__ == "__main__":
    main()
