"""Lines of a shard that are no document: how many are too many, and the list of them beside the output."""

from __future__ import annotations

from pathlib import Path

from hymba_train.data.user_files import write_or_refuse
from hymba_train.errors import UserError

MAX_BAD_LINES_SHOWN = 20


def bad_lines_path(prefix: str | Path) -> Path:
    """List of the lines that were passed over; only there if there are some."""
    return Path(f"{prefix}.bad_lines.txt")


def write_bad_lines(prefix: Path, bad_lines: list[str]) -> None:
    path = bad_lines_path(prefix)
    if bad_lines:
        write_or_refuse(path, "".join(f"{line}\n" for line in bad_lines).encode())
    else:
        path.unlink(missing_ok=True)


def check_bad_lines(bad_lines: list[str], allowed: int | None) -> None:
    """Raises UserError with the first of them when a shard has more than ``allowed``; None allows any number."""
    if allowed is None or len(bad_lines) <= allowed:
        return
    shown = bad_lines[:MAX_BAD_LINES_SHOWN]
    more = f" (and {len(bad_lines) - len(shown)} more so far)" if len(bad_lines) > len(shown) else ""
    shown[-1] += f"{more}; mend the input, or allow more than --max-bad-lines {allowed}"
    raise UserError(*shown)
