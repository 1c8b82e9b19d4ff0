"""The verbs ``hymba train`` and ``hymba reference``. Torch is imported once the configuration has been checked."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

from hymba_train.config import FROZEN_NAME, Config, freeze_run, run_directory
from hymba_train.config.arguments import config_parser, print_and_stop, read_config
from hymba_train.errors import UserError
from hymba_train.exit_codes import STOPPED_EARLY, USER_ERROR
from hymba_train.plan import make_plan

SECONDS_FOR_FIRST_RANK = 3


def run_train(argv: list[str]) -> int:
    """Returns the exit code. Raises UserError."""
    return _run_on_ranks("train", "Pretrain or fine-tune a model, alone or as a process of torchrun.", argv)


def run_reference(argv: list[str]) -> int:
    """As :func:`run_train`."""
    what = "Write the log-probabilities of preference pairs under the model that DPO starts from."
    return _run_on_ranks("reference", what, argv)


def _run_on_ranks(verb: str, description: str, argv: list[str]) -> int:
    """A verb whose work the processes of a run do together, with the configuration of that run."""
    parser = config_parser(verb, description)
    parser.add_argument("--nproc", type=int, metavar="N", help="start N processes on this machine, through torchrun")
    args = parser.parse_intermixed_args(argv)
    if print_and_stop(args):
        return 0
    rank, world_size = _from_launcher("RANK"), _from_launcher("WORLD_SIZE") or 1
    if args.nproc is not None:
        if rank is not None:
            raise UserError("--nproc: this is a process of torchrun already (RANK is set); leave --nproc out")
        if args.nproc < 1:
            raise UserError(f"--nproc {args.nproc}: give at least 1")
        world_size = args.nproc
    try:
        config = read_config(args)
        plan = make_plan(config, world_size, needs_reference=verb != "reference")
        plan.require_complete()
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


def _freeze(config: Config, frozen: str | None) -> Path:
    """resolved.yaml of the run directory; a run that is started from that very file leaves it alone."""
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


def _from_launcher(name: str) -> int | None:
    """A number that the launcher gave this process, or None if no launcher started it."""
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdigit():
        raise UserError(f"environment variable {name}={text!r} is not a number; start with torchrun, or unset it")
    return int(text)
