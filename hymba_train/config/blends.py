"""Blends by name: ``data.blends`` gives sources their weights once, and a phase says ``blend: NAME``."""

from __future__ import annotations

from hymba_train.config.nearest import did_you_mean
from hymba_train.config.schema import Plain
from hymba_train.errors import UserError


def name_blends(plain: Plain) -> Plain:
    """``plain`` with the weights themselves in place of the names that phases give; changes ``plain``.

    Only a name of ``data.blends`` is taken for one: whatever else is wrong is left for the typed checks to report.

    Raises UserError with one line for every name that ``data.blends`` does not have.
    """
    data = plain.get("data")
    phases = data.get("phases") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(phases, dict):
        return plain
    blends = data.get("blends") or {}
    problems = []
    for name, phase in phases.items():
        blend = phase.get("blend") if isinstance(phase, dict) else None
        if not isinstance(blend, str) or blend == "???":
            continue
        if blend in blends:
            phase["blend"] = dict(blends[blend])
            continue
        tail = did_you_mean(blend, list(blends), "blends are") if blends else "data.blends is empty"
        problems.append(f"data.phases.{name}.blend={blend}: no such blend; {tail}")
    if problems:
        raise UserError(*problems)
    return plain
