"""``hymba compare``: the verb."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from hymba_train.compare.members import SETS, choose_members, parse_budget
from hymba_train.compare.pool import Clock, Pool
from hymba_train.compare.report import as_json, table_lines, write_report
from hymba_train.compare.results import check_data, differences, read_results
from hymba_train.compare.study import Study, flops_at, make_study, num_parameters
from hymba_train.errors import UserError
from hymba_train.exit_codes import STOPPED_EARLY
from hymba_train.files import make_private
from hymba_train.parser import Parser

FAILED = 1
EXPERIMENT = "compare_20m"


def main(argv: Sequence[str], submit: Callable[[Study, Sequence[str], str | None], int]) -> int:
    """Run the verb. Returns 0 (all runs finished), 75 (some are left: start again), 1 (a run failed, or data differed).

    ``submit(study, cluster overrides, config_dir)`` gives the runs to a cluster instead: :mod:`launch.study`, on which
    nothing here depends. Raises UserError.
    """
    clock = Clock()
    args = _parser().parse_intermixed_args(list(argv))
    clock.limit_seconds = args.time_limit
    overrides = list(args.overrides)
    budgets = [text.partition("=")[2] for text in overrides if text.startswith("budget=")]
    clusters = [text for text in overrides if text.startswith(("cluster=", "cluster."))]
    overrides = [text for text in overrides if not text.startswith("budget=") and text not in clusters]
    experiments = [text.partition("=")[2] for text in overrides if text.startswith("experiment=")]
    if not experiments:
        overrides.insert(0, f"experiment={EXPERIMENT}")
    if not any(text.startswith("run.name=") for text in overrides):  # an experiment may put the model's name into it
        overrides.append(f"run.name={(experiments or [EXPERIMENT])[-1]}")
    for flag, value in (("--seeds", args.seeds), ("--jobs", args.jobs)):
        if value < 1:
            raise UserError(f"{flag} {value}: give at least 1")
    if args.time_limit is not None and args.time_limit <= 0:
        raise UserError(f"--time-limit {args.time_limit}: give seconds")
    study = make_study(
        choose_members(args.set, args.members, args.size, args.member), overrides, num_seeds=args.seeds,
        budget=parse_budget(budgets[-1]) if budgets else None, config_dir=args.config_dir, any_size=args.any_size,
        check_paths=not args.dry_run and not args.report,
    )  # fmt: skip
    for line in overview(study):
        print(line, flush=True)
    if args.dry_run:
        return 0
    if clusters:
        return submit(study, clusters, args.config_dir)
    failures: dict[str, str] = {}
    if not args.report:
        failures = Pool(args.jobs, clock, lambda line: _say(clock, line), args.fresh).train(study.runs)
    return report(study, failures, args.jobs)


def report(study: Study, failures: dict[str, str], num_jobs: int) -> int:
    """Read all results, write table and plots, print the table; returns the exit code."""
    from hymba_train.compare.plots import draw_all

    members = read_results(study, failures, time.time())
    check, found = check_data(members), differences(members)
    lines = table_lines(study, members, found, check, num_jobs)
    make_private(study.directory)
    write_report(study.directory, lines, as_json(study, members, found, check))
    plots = draw_all(study.directory, members, study.name)
    print("\n".join(lines))
    files = [study.directory / "table.md", study.directory / "table.json", *plots]
    print(f"\nwritten: {', '.join(map(str, files))}", flush=True)
    if check.problems or any(run.state.startswith(("failed", "ended by a guard")) for m in members for run in m.runs):
        return FAILED
    return 0 if all(run.is_finished for m in members for run in m.runs) else STOPPED_EARLY


def overview(study: Study) -> list[str]:
    """What is going to be trained, a line a member."""
    width = max(map(len, study.members))
    lines = [f"comparison {study.directory}: {len(study.members)} members x {study.num_seeds} seeds"]
    for member in study.members:
        config = study.config(member)
        tokens = sum(phase.tokens for phase in config.data.phases.values())
        lines.append(
            f"  {member:<{width}}  {num_parameters(config):>13,} parameters  {tokens:>13,} tokens  "
            f"{flops_at(config, tokens):.2e} FLOPs"
        )
    return lines


def _say(clock: Clock, line: str) -> None:
    print(f"[{clock.elapsed():6.0f} s] {line}", file=sys.stderr, flush=True)


def _parser() -> Parser:
    parser = Parser(
        prog="hymba compare",
        description="Train a set of models on identical data, one after another or several at a time; evaluate them; "
        "write one table and plots. Start it again to go on.",
    )
    parser.add_argument("set", metavar="SET", help=", ".join(SETS))
    parser.add_argument(
        "overrides", nargs="*", help=f"budget=10M (tokens, or 1e17flops), experiment=... (default {EXPERIMENT}), "
        "cluster=NAME for a Slurm array, and any other override, for all members",
    )  # fmt: skip
    parser.add_argument(
        "--members", metavar="A,B", help="only these rows: recipes model=A_SIZE, ... (default: the set)"
    )
    parser.add_argument(
        "--member", action="append", default=[], metavar="NAME='OVERRIDES'", help="one more of your own; repeatable"
    )
    parser.add_argument("--size", default="20m", help="size of the rows' recipes (default: 20m)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each member (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="save, stop and report within this time")
    parser.add_argument("--any-size", action="store_true", help="let parameter counts differ by more than 3 %%")
    parser.add_argument("--fresh", action="store_true", help="an interpreter for each run, no forks of a warm one")
    parser.add_argument("--config-dir", metavar="DIR", help="directory with more recipes")
    parser.add_argument("--dry-run", action="store_true", help="compose and check, print what would be trained")
    parser.add_argument("--report", action="store_true", help="train nothing; table and plots of what is there")
    return parser
