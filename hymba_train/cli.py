"""The command ``hymba``: one verb a task.

Only the chosen verb's code is imported, so ``hymba plan`` answers without torch. Errors that the user can mend are one
line each on stderr and exit code 2; an interrupt is exit code 130.
"""

from __future__ import annotations

import _thread
import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hymba_train.errors import UserError
from hymba_train.exit_codes import INTERRUPTED, USER_ERROR

SECONDS_UNTIL_AGAIN = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with _no_interrupt_lost():
            return _dispatch(argv)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"hymba: error: {line}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("hymba: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `hymba plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


@contextlib.contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """Python drops an interrupt that comes while something is finalised, as every import does: it comes again."""
    before = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
            return
        again = threading.Timer(SECONDS_UNTIL_AGAIN, _thread.interrupt_main)
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _dispatch(argv: list[str]) -> int:
    from hymba_train.config.nearest import did_you_mean

    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if argv else USER_ERROR
    name = "version" if argv[0] == "--version" else argv[0]
    if name not in VERBS:
        raise UserError(f"{name}: no such verb; {did_you_mean(name, VERBS, 'verbs')}")
    return VERBS[name].run(argv[1:])


def _help() -> str:
    lines = ["usage: hymba VERB [options] [overrides]", ""]
    lines += [f"  {name:<9} {verb.summary}" for name, verb in VERBS.items()]
    lines += ["", "hymba VERB --help says more. Overrides look like experiment=demo or optim.lr=1e-3."]
    return "\n".join(lines)


def run_version(argv: list[str]) -> int:
    if argv:
        raise UserError("hymba version takes no arguments")
    from hymba_train import __version__

    print(f"hymba_train {__version__}")
    return 0


@dataclass(frozen=True)
class Verb:
    """``target`` is 'module:function', imported when the verb is chosen; the function takes argv, returns the code."""

    summary: str
    target: str

    def run(self, argv: list[str]) -> int:
        module, _, function = self.target.partition(":")
        return getattr(importlib.import_module(module), function)(argv)


VERBS = {
    "train": Verb("pretrain a model", "hymba_train.train.cli:run_train"),
    "reference": Verb(
        "log-probabilities of preference pairs under the start model, for DPO", "hymba_train.train.cli:run_reference"
    ),
    "plan": Verb(
        "compose and check a run; print layers, stages, phases, parameters; no GPU needed", "hymba_train.plan.cli:main"
    ),
    "launch": Verb("start a run on a Slurm cluster or on this machine; start it again when cut off", "launch.cli:main"),
    "runs": Verb("list runs, draw their curves", "hymba_train.runs.cli:main"),
    "generate": Verb("continue prompts with a checkpoint or an exported model", "hymba_train.convert.cli:run_generate"),
    "eval": Verb(
        "held-out perplexity by domain, recall tasks, lm-evaluation-harness tasks",
        "hymba_train.evaluation.cli:run_eval",
    ),
    "compare": Verb("train a set of models on identical data: one table, and plots", "launch.study:main"),
    "convert": Verb("Hugging Face format in and out", "hymba_train.convert.cli:run_convert"),
    "data": Verb("prepare training data: tokenise, merge, inspect, validate", "data_prep.cli:main"),
    "bench": Verb("measure the speed of kernels and of a training step", "hymba_train.bench.cli:main"),
    "analyze": Verb(
        "attention, branch importance, caches, keys and values, throughput: tables and pictures",
        "hymba_train.analyze.cli:main",
    ),
    "doctor": Verb("check this machine: versions, kernels, speeds", "hymba_train.doctor.cli:main"),
    "version": Verb("print the version", "hymba_train.cli:run_version"),
}
