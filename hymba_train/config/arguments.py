"""Arguments of the verbs that take a run's configuration."""

from __future__ import annotations

import argparse

from hymba_train.config.compose import compose
from hymba_train.config.document import document_keys
from hymba_train.config.freeze import load_frozen, to_yaml
from hymba_train.config.schema import Config
from hymba_train.errors import UserError
from hymba_train.parser import Parser


def config_parser(verb: str, description: str) -> Parser:
    """The parser of ``hymba VERB [overrides]``, for what :func:`read_config` and :func:`print_and_stop` read."""
    parser = Parser(prog=f"hymba {verb}", description=description)
    parser.add_argument("overrides", nargs="*", help="experiment=demo model=hymba_125m optim.lr=1e-3 ~data.phases.long")
    parser.add_argument(
        "--config-dir", metavar="DIR", help="directory with more recipes (DIR/experiment/mine.yaml, ...)"
    )
    parser.add_argument("--frozen", metavar="FILE", help="resolved.yaml of a run, instead of overrides")
    parser.add_argument("--cfg", action="store_true", help="print the composed configuration and stop")
    parser.add_argument("--help-keys", action="store_true", help="print every key with type, default and meaning")
    return parser


def read_config(args: argparse.Namespace) -> Config:
    """The configuration that the arguments name. Raises UserError."""
    if args.frozen is None:
        return compose(args.overrides, config_dir=args.config_dir)
    if args.overrides or args.config_dir:
        raise UserError("--frozen: a frozen configuration takes no overrides and no --config-dir; leave them out")
    return load_frozen(args.frozen)


def print_and_stop(args: argparse.Namespace) -> bool:
    """--help-keys and --cfg: whether that was all that was asked for. Raises UserError."""
    if args.help_keys:
        print(document_keys(), end="")
    elif args.cfg:
        print(to_yaml(read_config(args)), end="")
    return args.help_keys or args.cfg
