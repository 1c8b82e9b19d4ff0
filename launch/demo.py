"""``make demo``: the whole way once, small: text -> tokens -> training on two processes -> resume -> generation.

Every part is a ``hymba`` command that is printed before it runs, so that it can be typed again by hand.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

DATA = Path("build/demo-data")
RUN = Path("runs/demo")
PROCESSES = 2
STOP_AT = 120  # the first of the two training commands stops here; the second goes on to the end
PROMPT = "It is a truth universally acknowledged, that a"


def main() -> int:
    started = time.monotonic()
    # On the CPU: two processes may find one GPU, and `make setup` installs no GPU packages.
    overrides = ["experiment=demo", "run.device=cpu", *sys.argv[1:]]
    if (RUN / "metrics.jsonl").exists():
        say(f"{RUN} is there already: the demo goes on from its last checkpoint (to start anew: rm -r {RUN})")
    say("1. The bundled text (novels, speeches, manuals, source code) becomes tokens")
    hymba("data", "prepare-demo", "--output", str(DATA))
    say("2. What will be trained: checked and planned before it starts")
    hymba("plan", *overrides)
    say(f"3. Training on {PROCESSES} processes, data-parallel; stopped at step {STOP_AT}, with a checkpoint")
    hymba("train", *overrides, "--nproc", str(PROCESSES), f"run.train_steps={STOP_AT}")
    say("4. The same command again resumes it, and trains to the end")
    hymba("train", *overrides, "--nproc", str(PROCESSES))
    say("5. What it has learnt: a prompt, continued")
    sampling = ["--temperature", "0.7", "--top-p", "0.9", "--seed", "1"]
    hymba("generate", "--model", str(RUN), "--prompt", PROMPT, "--max-new-tokens", "60", *sampling)
    summary(time.monotonic() - started)
    return 0


def hymba(*arguments: str) -> None:
    """Run one command in a process of its own; end the demo with its exit code if it fails."""
    print(f"$ hymba {shlex.join(arguments)}", flush=True)
    env = {"OMP_NUM_THREADS": "1", **os.environ}  # one thread a process: the processes are the parallelism
    done = subprocess.run([sys.executable, "-m", "hymba_train", *arguments], env=env)
    if done.returncode:
        sys.exit(done.returncode)


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def summary(seconds: float) -> None:
    """The losses before and after, where things are, and what to try next."""
    records = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    train = [r for r in records if r["event"] == "train"]
    held_out = [r for r in records if r["event"] == "validation"]
    say(f"Done in {seconds / 60:.1f} minutes")
    print(f"training loss   {train[0]['loss']:.2f} (step {train[0]['step']}) -> {train[-1]['loss']:.2f}")
    for domain, loss in held_out[-1]["loss"].items():
        print(f"held-out loss   {held_out[0]['loss'][domain]:.2f} -> {loss:.2f}   {domain}")
    print(
        f"""
{RUN}/loss_curves.png     the picture of it         {RUN}/checkpoints/    load under any parallel layout
{RUN}/metrics.jsonl       every number              {RUN}/resolved.yaml   the whole configuration

Try next:
  hymba train experiment=demo run.name=tp2 parallel=tp2 --nproc 2       the same model, split over two processes
  hymba train experiment=demo run.name=wide model.hidden_size=192       any key can be overridden; run --help-keys
  hymba plan experiment=pretrain_1p5b                                   the real thing, planned for 128 GPUs"""
    )


if __name__ == "__main__":
    sys.exit(main())
