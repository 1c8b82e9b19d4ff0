"""Whether a run that goes on reads the data it has read so far.

A checkpoint keeps :meth:`TrainingData.identity`. What decides the samples of the phases trained so far must be the
same when the run goes on, or samples would be repeated, skipped or mean something else; later phases may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hymba_train.errors import UserError

OVERRIDE = "checkpoint.accept_changed_data=true"


def changes(saved: Mapping[str, Any], now: Mapping[str, Any], phase_index: int) -> list[str]:
    """One line for everything that differs in the phases 0..phase_index: what it was, what it is."""
    found = [
        f"{key}: {saved.get(name)} -> {now.get(name)}"
        for name, key in (
            ("tokenizer", "data.tokenizer (sha256)"), ("seed", "run.seed"), ("document_mask", "data.document_mask"),
        )
        if saved.get(name) != now.get(name)
    ]  # fmt: skip
    used: set[str] = set()
    for index in range(phase_index + 1):
        old, new = (_phase(identity, index) for identity in (saved, now))
        key = f"data.phases.{new.get('name') or old.get('name')}"
        found += [
            f"{key}.{name}: {old.get(name)} -> {new.get(name)}"
            for name in ("name", "seq_length", "packing", "packs", "blend")
            if old.get(name) != new.get(name)
        ]
        used |= set(old.get("blend", ())) & set(new.get("blend", ()))
    for name in sorted(used):
        old, new = saved["sources"].get(name, {}), now["sources"].get(name, {})
        found += [
            f"data.sources.{name} ({what}): {old.get(what)} -> {new.get(what)}"
            for what in ("files", "training_tokens")
            if old.get(what) != new.get(what)
        ]
    return found


class DataRecord:
    """What the checkpoints of a run say about its data.

    Args:
        identity: :meth:`TrainingData.identity` of this start of the run.
    """

    def __init__(self, identity: Mapping[str, Any]) -> None:
        self.identity = identity
        self.accepted_changes: list[str] = []

    def to_dict(self) -> dict[str, Any]:
        """The entry ``data`` of checkpoint.json."""
        return {"identity": self.identity, "accepted_changes": self.accepted_changes}

    def resume(
        self, saved: Mapping[str, Any] | None, train_state: Mapping[str, int], accept: bool, checkpoint: str
    ) -> list[str]:
        """Hold the data to those of the checkpoint that the run goes on from. Returns the changes now accepted, one
        line each, for the log; they and those accepted before are recorded in all later checkpoints.

        Args:
            saved: entry ``data`` of its checkpoint.json; None if it has none (then there is nothing to compare).
            train_state: its step and phase.
            accept: checkpoint.accept_changed_data.
            checkpoint: its name, for the messages.

        Raises UserError, one line a difference, unless ``accept``.
        """
        if saved is None:
            return []
        found = changes(saved["identity"], self.identity, train_state["phase"])
        if found and not accept:
            raise UserError(
                *(
                    f"{checkpoint}: {line}: going on would repeat, skip or change samples; restore it, or accept that "
                    f"with {OVERRIDE} (it is recorded)"
                    for line in found
                )
            )
        self.accepted_changes = [*saved["accepted_changes"], *(f"step {train_state['step']}: {line}" for line in found)]
        return found


def _phase(identity: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    phases = identity["phases"]
    return phases[index] if index < len(phases) else {}
