"""The verb ``hymba plan``."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from hymba_train.config.arguments import config_parser, print_and_stop, read_config
from hymba_train.errors import UserError
from hymba_train.plan.picture import draw_stack
from hymba_train.plan.plan import make_plan
from hymba_train.plan.render import plan_to_json, print_plan, print_suggestions
from hymba_train.plan.suggest import DEFAULT_MEMORY_GIB, suggest


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code. Raises UserError."""
    parser = config_parser("plan", "Compose and check a run; print layers, stages, phases, parameters. No GPU needed.")
    parser.add_argument("--world-size", type=int, metavar="N", help="plan for N processes")
    parser.add_argument("--skip-paths", action="store_true", help="do not look whether the data is there")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--png", metavar="FILE", help="draw the stack of layers instead")
    parser.add_argument("--gpu", metavar="NAME", help="step time and days on this GPU alone, e.g. H200")
    parser.add_argument("--suggest", metavar="gpus=N[,memory=GIB]", help="layouts that fit, ranked by estimate")
    args = parser.parse_intermixed_args(argv)
    if print_and_stop(args):
        return 0
    if args.suggest is not None:
        return _suggest(args)
    if args.world_size is not None and args.world_size < 1:
        raise UserError(f"--world-size {args.world_size}: give at least 1")
    plan = make_plan(read_config(args), args.world_size, check_paths=not args.skip_paths)
    if args.png:
        draw_stack(plan, Path(args.png))
        print(args.png)
    elif args.json:
        print(json.dumps(plan_to_json(plan, args.gpu), indent=1))
    else:
        print_plan(plan, gpu=args.gpu)
    return 0


def _suggest(args: argparse.Namespace) -> int:
    match = re.fullmatch(r"gpus=([1-9]\d*)(?:,memory=(\d+(?:\.\d+)?))?", args.suggest)
    if match is None:
        raise UserError(f"--suggest {args.suggest}: write gpus=64, or gpus=64,memory=141 (GiB of a GPU)")
    num_gpus, memory_gib = int(match[1]), float(match[2] or DEFAULT_MEMORY_GIB)
    suggestions = suggest(read_config(args), num_gpus, memory_gib, gpu=args.gpu)
    if args.json:
        print(json.dumps([asdict(s) for s in suggestions], indent=1))
    else:
        print_suggestions(suggestions, num_gpus, memory_gib)
    return 0
