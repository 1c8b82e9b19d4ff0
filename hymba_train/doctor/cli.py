"""``hymba doctor [--json] [--quick] [--directory DIR]``; under torchrun also the network between the ranks."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from hymba_train.doctor import kernels, ranks, software, speed
from hymba_train.doctor.report import Report
from hymba_train.errors import UserError
from hymba_train.parser import Parser

BROKEN = 1


def main(argv: Sequence[str]) -> int:
    """Print the page; returns 1 if something is broken."""
    parser = Parser(prog="hymba doctor", description="Check this machine: versions, kernels, speeds.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="smaller measurements")
    parser.add_argument("--directory", default=".", metavar="DIR", help="where the disk is measured (default: .)")
    args = parser.parse_args(list(argv))
    directory = Path(args.directory)
    if not directory.is_dir():
        raise UserError(f"--directory {directory}: no such directory")
    warnings.simplefilter("ignore")  # the libraries' remarks while they are imported are not the report
    logging.disable(logging.WARNING)
    report = Report()
    report.section("System", software.system)
    report.section("Packages", software.packages)
    report.section("CUDA", software.drivers)
    report.section("Kernels", kernels.kernels)
    report.section("Speed", lambda: [*speed.gpu(args.quick), *speed.disk(directory, args.quick)])
    if ranks.is_launched():
        _ask_the_others(report, args.quick)
    if int(os.environ.get("RANK", 0)) == 0:
        print(report.to_json() if args.json else report.text())
    return BROKEN if report.is_broken else 0


def _ask_the_others(report: Report, quick: bool) -> None:
    """All ranks do this together; none leaves early because of what it found by itself."""
    joined = False

    def network() -> list:
        nonlocal joined
        ranks.join()
        joined = True
        return [*ranks.all_reduce(quick), *ranks.clocks()]

    report.section("Network", network)
    if joined:
        report.section("Other ranks", lambda: ranks.broken_elsewhere(report))
        ranks.leave()
