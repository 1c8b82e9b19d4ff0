"""Who takes part: sets of the paper's rows, and members made of overrides. Free of torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from hymba_train.config.nearest import did_you_mean
from hymba_train.errors import UserError

SETS: dict[str, tuple[str, ...]] = {
    "roadmap": ("transformer", "mamba", "sequential", "parallel", "local_global", "kv_sharing", "hymba"),
    "baselines": ("transformer", "mamba", "mamba_ffn", "mamba2", "mamba2_ffn", "samba", "hymba"),
    "custom": (),
}
"""Rows of the design roadmap, and the models of the comparison under the same settings, in the paper's order. A row is
the recipe model=ROW_SIZE. ``custom``: only what --member says."""

_NAME = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class Member:
    """``overrides`` are those that make it differ from the others."""

    name: str
    overrides: tuple[str, ...]


def choose_members(set_name: str, wanted: str | None, size: str, own: Sequence[str]) -> list[Member]:
    """Members of a set, or those of them that ``wanted`` (``a,b``) names, then the user's own.

    Args:
        own: ``NAME=OVERRIDES`` each, the overrides as a shell would split them.

    Raises UserError. Whether a row has a recipe of this size shows when it is composed.
    """
    if set_name not in SETS:
        raise UserError(f"hymba compare {set_name}: no such set; {did_you_mean(set_name, SETS, 'sets are')}")
    rows = [name for name in (wanted or "").split(",") if name] if wanted is not None else list(SETS[set_name])
    members = [Member(row, (f"model={row}_{size}",)) for row in rows]
    for text in own:
        name, equals, overrides = text.partition("=")
        if not equals or not overrides.strip():
            raise UserError(
                f"--member {text!r}: write NAME='OVERRIDES', e.g. wide='model=hymba_20m model.window_size=64'"
            )
        members.append(Member(name, tuple(shlex.split(overrides))))
    names = [member.name for member in members]
    problems = [f"--members: {name} is named twice" for name in sorted({n for n in names if names.count(n) > 1})]
    problems += [
        f"--member {name!r}: a name holds letters, digits and _.+-" for name in names if not _NAME.fullmatch(name)
    ]
    if len(members) < 2:
        problems.append(f"hymba compare {set_name}: a comparison needs two members; give --members or --member")
    if problems:
        raise UserError(*problems)
    return members


@dataclass(frozen=True)
class Budget:
    """How long every member trains."""

    amount: float
    in_flops: bool


_BUDGET = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?)([kMBT]?)(flops)?", re.IGNORECASE)
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def parse_budget(text: str) -> Budget:
    """Tokens (``10M``, ``2e7``) or FLOPs (``1e17flops``) a member. Raises UserError.

    >>> parse_budget("10M"), parse_budget("1e17flops")
    (Budget(amount=10000000.0, in_flops=False), Budget(amount=1e+17, in_flops=True))
    """
    match = _BUDGET.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise UserError(f"budget={text}: write tokens, e.g. 10M or 2e7, or FLOPs, e.g. 1e17flops")
    return Budget(float(match[1]) * _UNITS[match[2].lower()], match[3] is not None)
