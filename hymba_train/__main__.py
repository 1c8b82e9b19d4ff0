"""``python -m hymba_train VERB ...``: the same as the console script ``hymba``."""

import sys

from hymba_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
