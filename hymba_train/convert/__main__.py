"""``python -m hymba_train.convert to-hf | from-hf ...``: ``hymba convert`` by itself, for background exports."""

import sys

from hymba_train.convert.cli import run_convert
from hymba_train.errors import UserError


def main() -> int:
    """Run it on the command line's arguments; returns the exit code."""
    try:
        return run_convert(sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
