"""``hymba bench NAME``: one benchmark, a table at its end."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from hymba_train.errors import UserError

BENCHMARKS = {
    "step": "hymba_train.bench.step",
    "scan": "hymba_train.bench.scan",
    "attention": "hymba_train.bench.attention",
    "gemm": "hymba_train.bench.gemm",
    "loader": "hymba_train.bench.loader",
}


def main(argv: Sequence[str]) -> int:
    """Returns the exit code of the benchmark: 0, or 1 if a part of it failed. Raises UserError for an unknown name."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"hymba bench {{{','.join(BENCHMARKS)}}} [options]; hymba bench NAME --help")
        return 0
    if argv[0] not in BENCHMARKS:
        raise UserError(f"hymba bench {argv[0]}: known are {', '.join(BENCHMARKS)}")
    return importlib.import_module(BENCHMARKS[argv[0]]).main(list(argv[1:])) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
