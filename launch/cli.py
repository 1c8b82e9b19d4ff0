"""``hymba launch slurm`` and ``hymba launch local``."""

from __future__ import annotations

from collections.abc import Sequence

from hymba_train.config.nearest import did_you_mean
from hymba_train.errors import UserError
from hymba_train.parser import Parser

USAGE = """usage: hymba launch slurm experiment=... cluster=... [overrides] [options]
       hymba launch local experiment=... [overrides] [--nproc N]

  slurm  write a batch script and submit it; the job saves before its time limit and comes back by itself
  local  train on this machine through torchrun; start again after a failure

hymba launch slurm --help says more."""


def main(argv: Sequence[str]) -> int:
    """Run one kind of launch; returns the exit code. Raises UserError."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "slurm":
        from launch.slurm import run_slurm

        return run_slurm(_slurm_parser().parse_intermixed_args(list(argv[1:])))
    if argv[0] == "local":
        from launch.local import run_local

        return run_local(_local_parser().parse_intermixed_args(list(argv[1:])))
    raise UserError(f"hymba launch {argv[0]}: no such kind; {did_you_mean(argv[0], ('slurm', 'local'), 'kinds are')}")


def _slurm_parser() -> Parser:
    parser = Parser(prog="hymba launch slurm", description="Write a batch script, and submit it.")
    _add_common(parser, "experiment=demo cluster=local_test cluster.time_limit=01:00:00 optim.lr=1e-3")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes that train (default: cluster.nodes)")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=A,B", help="one run a value, in one job array; repeatable"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script, let Slurm check it, submit nothing")
    parser.add_argument(
        "--skip-paths", action="store_true", help="with --dry-run: do not look whether the data is there"
    )
    return parser


def _local_parser() -> Parser:
    parser = Parser(prog="hymba launch local", description="Train on this machine through torchrun.")
    _add_common(parser, "experiment=demo optim.lr=1e-3")
    parser.add_argument("--nproc", type=int, metavar="N", help="processes (default: one a GPU, or 1)")
    parser.add_argument(
        "--max-restarts", type=int, default=3, metavar="N", help="new starts after failures (default: 3)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the torchrun command, start nothing")
    return parser


def _add_common(parser: Parser, example: str) -> None:
    parser.add_argument("overrides", nargs="*", help=example)
    parser.add_argument("--config-dir", metavar="DIR", help="directory with more recipes (DIR/cluster/mine.yaml, ...)")
