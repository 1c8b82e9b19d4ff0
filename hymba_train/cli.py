"""The command ``hymba``: one verb a task.

Only the chosen verb's code is imported, so ``hymba plan`` answers without torch. Errors that the user can mend are one
line each on stderr and exit code 2; an interrupt is exit code 130.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hymba_train.errors import UserError
from hymba_train.parser import Parser

if TYPE_CHECKING:
    from hymba_train.config import Config
    from hymba_train.plan import Plan

USER_ERROR, INTERRUPTED = 2, 130
SECONDS_FOR_FIRST_RANK = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
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


def _config_parser(verb: str) -> Parser:
    parser = Parser(prog=f"hymba {verb}", description=VERBS[verb].summary)
    parser.add_argument("overrides", nargs="*", help="experiment=demo model=hymba_125m optim.lr=1e-3 ~data.phases.long")
    parser.add_argument(
        "--config-dir", metavar="DIR", help="directory with more recipes (DIR/experiment/mine.yaml, ...)"
    )
    parser.add_argument("--frozen", metavar="FILE", help="resolved.yaml of a run, instead of overrides")
    parser.add_argument("--cfg", action="store_true", help="print the composed configuration and stop")
    parser.add_argument("--help-keys", action="store_true", help="print every key with type, default and meaning")
    return parser


def _read_config(args: argparse.Namespace) -> Config:
    from hymba_train.config import compose, load_frozen

    if args.frozen is None:
        return compose(args.overrides, config_dir=args.config_dir)
    if args.overrides or args.config_dir:
        raise UserError("--frozen: a frozen configuration takes no overrides and no --config-dir; leave them out")
    return load_frozen(args.frozen)


def _print_and_stop(args: argparse.Namespace) -> bool:
    """--help-keys and --cfg."""
    from hymba_train.config import document_keys, to_yaml

    if args.help_keys:
        print(document_keys(), end="")
    elif args.cfg:
        print(to_yaml(_read_config(args)), end="")
    return args.help_keys or args.cfg


def run_plan(argv: list[str]) -> int:
    parser = _config_parser("plan")
    parser.add_argument("--world-size", type=int, metavar="N", help="plan for N processes")
    parser.add_argument("--skip-paths", action="store_true", help="do not look whether the data is there")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--png", metavar="FILE", help="draw the stack of layers instead")
    parser.add_argument("--gpu", metavar="NAME", help="step time and days on this GPU alone, e.g. H200")
    parser.add_argument("--suggest", metavar="gpus=N[,memory=GIB]", help="layouts that fit, ranked by estimate")
    args = parser.parse_intermixed_args(argv)
    if _print_and_stop(args):
        return 0
    from hymba_train.plan import make_plan
    from hymba_train.plan.render import plan_to_json, print_plan

    if args.suggest is not None:
        return _suggest(args)
    if args.world_size is not None and args.world_size < 1:
        raise UserError(f"--world-size {args.world_size}: give at least 1")
    plan = make_plan(_read_config(args), args.world_size, check_paths=not args.skip_paths)
    if args.png:
        from hymba_train.plan.picture import draw_stack

        draw_stack(plan, Path(args.png))
        print(args.png)
    elif args.json:
        print(json.dumps(plan_to_json(plan, args.gpu), indent=1))
    else:
        print_plan(plan, gpu=args.gpu)
    return 0


def _suggest(args: argparse.Namespace) -> int:
    from hymba_train.plan.render import print_suggestions
    from hymba_train.plan.suggest import DEFAULT_MEMORY_GIB, suggest

    match = re.fullmatch(r"gpus=([1-9]\d*)(?:,memory=(\d+(?:\.\d+)?))?", args.suggest)
    if match is None:
        raise UserError(f"--suggest {args.suggest}: write gpus=64, or gpus=64,memory=141 (GiB of a GPU)")
    num_gpus, memory_gib = int(match[1]), float(match[2] or DEFAULT_MEMORY_GIB)
    suggestions = suggest(_read_config(args), num_gpus, memory_gib, gpu=args.gpu)
    if args.json:
        print(json.dumps([asdict(s) for s in suggestions], indent=1))
    else:
        print_suggestions(suggestions, num_gpus, memory_gib)
    return 0


def run_train(argv: list[str]) -> int:
    return _run_on_ranks("train", argv)


def run_reference(argv: list[str]) -> int:
    return _run_on_ranks("reference", argv)


def _run_on_ranks(verb: str, argv: list[str]) -> int:
    """A verb whose work the processes of a run do together, with the configuration of that run."""
    parser = _config_parser(verb)
    parser.add_argument("--nproc", type=int, metavar="N", help="start N processes on this machine, through torchrun")
    args = parser.parse_intermixed_args(argv)
    if _print_and_stop(args):
        return 0
    rank, world_size = _rank(), _world_size()
    if args.nproc is not None:
        if rank is not None:
            raise UserError("--nproc: this is a process of torchrun already (RANK is set); leave --nproc out")
        if args.nproc < 1:
            raise UserError(f"--nproc {args.nproc}: give at least 1")
        world_size = args.nproc
    try:
        config, plan = _prepare_training(args, world_size, needs_reference=verb != "reference")
    except UserError:
        if rank is None or os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        # Every rank of this machine found the same, and its first one says so; it must come to that before torchrun,
        # which ends all processes as soon as one has failed, sees this one.
        time.sleep(SECONDS_FOR_FIRST_RANK)
        return USER_ERROR
    resolved = _freeze(config, args.frozen) if not rank else None
    if args.nproc is not None:
        return _torchrun(verb, args.nproc, str(resolved))
    from hymba_train.exit_codes import STOPPED_EARLY

    if verb == "train":
        from hymba_train.train.main import train as work
    else:
        from hymba_train.train.reference_pass import reference as work

    _set_up_logging(rank or 0)
    try:
        code = work(config, plan)
    except UserError as error:
        if not rank:
            raise
        if error.said_by is not None:
            time.sleep(SECONDS_FOR_FIRST_RANK)  # as above
            return USER_ERROR
        raise UserError(*(f"[rank {rank}] {line}" for line in error.problems)) from error
    # torchrun takes any code but 0 for a failure and starts all ranks again; the file `outcome` tells who started it.
    return 0 if code == STOPPED_EARLY and "TORCHELASTIC_RUN_ID" in os.environ else code


def _set_up_logging(rank: int) -> None:
    """Our own messages on the first rank; elsewhere and from libraries warnings and worse, with the rank in front."""
    prefix = f"[rank {rank}] " if rank else ""
    logging.basicConfig(
        level=logging.WARNING,
        format=f"{prefix}%(asctime)s %(levelname)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        stream=sys.stderr,
    )
    logging.getLogger("hymba_train").setLevel(logging.WARNING if rank else logging.INFO)


def _prepare_training(args: argparse.Namespace, world_size: int, needs_reference: bool) -> tuple[Config, Plan]:
    from hymba_train.plan import make_plan

    config = _read_config(args)
    plan = make_plan(config, world_size, needs_reference=needs_reference)
    plan.require_complete()
    return config, plan


def _freeze(config: Config, frozen: str | None) -> Path:
    """resolved.yaml of the run directory; a run that is started from that very file leaves it alone."""
    from hymba_train.config import FROZEN_NAME, freeze_run, run_directory

    path = run_directory(config) / FROZEN_NAME
    if frozen is not None and os.path.realpath(frozen) == os.path.realpath(path):
        return path
    path, changes = freeze_run(config)
    for line in changes:
        print(f"hymba: changed since the last start: {line}", file=sys.stderr)
    return path


def _torchrun(verb: str, num_processes: int, resolved: str) -> int:
    """Replace this process by torchrun, so that signals reach it directly."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    command += ["-m", "hymba_train", verb, "--frozen", resolved]
    # torchrun keeps one store for all restarts, in which a restarted rank finds the addresses of dead ones; this gives
    # every restart a store of its own.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # Left alone, torchrun dies of SIGUSR1 and leaves its processes running; like this it passes the signal on.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    # Left alone, torchrun gives every process one thread and warns about it.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, command)


def _rank() -> int | None:
    """Rank that the launcher gave this process, or None if no launcher did."""
    return _number_from_launcher("RANK")


def _world_size() -> int:
    return _number_from_launcher("WORLD_SIZE") or 1


def _number_from_launcher(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdigit():
        raise UserError(f"environment variable {name}={text!r} is not a number; start with torchrun, or unset it")
    return int(text)


def run_compare(argv: list[str]) -> int:
    from hymba_train.compare.cli import main as compare
    from launch.study import submit_study

    return compare(argv, submit_study)


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
    "train": Verb("pretrain a model", "hymba_train.cli:run_train"),
    "reference": Verb(
        "log-probabilities of preference pairs under the start model, for DPO", "hymba_train.cli:run_reference"
    ),
    "plan": Verb(
        "compose and check a run; print layers, stages, phases, parameters; no GPU needed", "hymba_train.cli:run_plan"
    ),
    "launch": Verb("start a run on a Slurm cluster or on this machine; start it again when cut off", "launch.cli:main"),
    "runs": Verb("list runs, draw their curves", "hymba_train.runs.cli:main"),
    "generate": Verb("continue prompts with a checkpoint or an exported model", "hymba_train.convert.cli:run_generate"),
    "eval": Verb(
        "held-out perplexity by domain, recall tasks, lm-evaluation-harness tasks",
        "hymba_train.evaluation.cli:run_eval",
    ),
    "compare": Verb("train a set of models on identical data: one table, and plots", "hymba_train.cli:run_compare"),
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
