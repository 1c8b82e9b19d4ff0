"""Errors that are the user's to mend."""

from __future__ import annotations


class UserError(Exception):
    """Bad configuration, file or layout. The message is one line a problem, each naming the key, file or offset and
    what to do; the command line prints it and exits with code 2, without a traceback."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
        self.said_by: int | None = None  # rank that prints it, where all ranks raise the same one; None: whoever has it


class ReplicasDiffer(Exception):
    """Copies of a parameter are no longer equal; the message names it and the ranks. Raised on every rank."""


RAISED_BY_ALL = (UserError, ReplicasDiffer)
"""What ranks come to by agreement: when one raises such an error, the others do, too, and none is dead."""
