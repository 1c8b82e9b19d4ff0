"""Command-line parser of every verb."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from hymba_train.errors import UserError


class Parser(argparse.ArgumentParser):
    """Errors as one line through UserError, like every other; options are written out."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")
