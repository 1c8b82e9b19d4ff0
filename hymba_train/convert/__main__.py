"""``python -m hymba_train.convert to-hf | from-hf ...``: ``hymba convert`` by itself, for background exports."""

import sys

from hymba_train.convert.cli import run_convert
from hymba_train.errors import UserError

if __name__ == "__main__":
    try:
        sys.exit(run_convert(sys.argv[1:]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
