"""``hymba analyze NAME``: one analysis."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from hymba_train.config.nearest import did_you_mean
from hymba_train.errors import UserError

ANALYSES = {
    "attention": "where attention heads and the SSM's implied attention look: Meta, BOS, Self, Cross; maps; entropy",
    "importance": "loss and task change without the attention or the SSM branch of each layer",
    "cache": "bytes of keys, values and states against sequence length, for all recipes; needs no model",
    "kv": "how alike keys and values are across heads and layers",
    "throughput": "prefill and decode speed and cache beside a Llama-style Transformer of the same size",
}


def main(argv: Sequence[str]) -> int:
    """Returns the exit code. Raises UserError for an unknown name."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("usage: hymba analyze NAME [options]\n")
        print("\n".join(f"  {name:<11} {summary}" for name, summary in ANALYSES.items()))
        print("\nhymba analyze NAME --help says more.")
        return 0 if argv else 2
    if argv[0] not in ANALYSES:
        raise UserError(f"hymba analyze {argv[0]}: no such analysis; {did_you_mean(argv[0], ANALYSES, 'there are')}")
    return importlib.import_module(f"hymba_train.analyze.{argv[0]}").main(list(argv[1:])) or 0
