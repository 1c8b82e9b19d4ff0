"""`hymba data pack`: build, offline and once, the packings that the phases of a run ask for."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hymba_train.config.schema import Config
from hymba_train.data.build import load_tokenizer, open_packs, open_source, pack_location
from hymba_train.data.packs import build_packs
from hymba_train.data.storage import exists, is_url, upload
from hymba_train.errors import UserError

LOW_FILL = 0.97


def pack_phases(config: Config, *, overwrite: bool = False, say: Callable[[str], None] = print) -> list[str]:
    """Build what is missing, beside its source (uploaded there if that is remote). Returns the places built.

    Raises UserError: sources that cannot be opened, or a packing that belongs to other data without ``overwrite``.
    """
    wanted = [phase for phase in config.data.phases.values() if phase.packing != "concat"]
    if not wanted:
        raise UserError("no phase asks for a packing: set data.phases.NAME.packing to best_fit or length_buckets")
    tokenizer = load_tokenizer(config.data)
    built: list[str] = []
    for phase in wanted:
        for name in sorted(name for name, weight in phase.blend.items() if weight > 0):
            source = open_source(config.data, name, config.data.sources[name], tokenizer, references=False)
            place = pack_location(config.data, phase, source)
            if place in built:
                continue
            if not overwrite and (exists(place) if is_url(place) else Path(place).exists()):
                open_packs(config.data, phase, source, tokenizer.eod_id)
                say(f"{place} is there already")
                continue
            say(f"packing {source.training.num_documents:,} documents of {name} into sequences of {phase.seq_length}")
            start_seconds = time.monotonic()
            facts = _build(phase, source, place)
            built.append(place)
            for line in summary(place, facts, time.monotonic() - start_seconds):
                say(line)
    return built


def _build(phase: Any, source: Any, place: str) -> dict[str, Any]:
    together = 1 if source.manifest is None else source.manifest.documents_per_piece
    arguments = (phase.packing, phase.seq_length, phase.min_document_tokens, together)
    if not is_url(place):
        return build_packs(source.training, place, *arguments)
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch, place.rsplit("/", 1)[-1])
        facts = build_packs(source.training, local, *arguments)
        upload(local, place)
    return facts


def summary(place: str, facts: dict[str, Any], seconds: float) -> list[str]:
    """What came out, for people."""
    fill = 1 - facts["num_padding_tokens"] / (facts["num_sequences"] * (facts["seq_length"] + 1))
    lines = [
        f"{place}: {facts['num_sequences']:,} sequences, {fill:.2%} full, of {facts['num_pieces']:,} pieces; "
        f"{facts['num_documents_cut']:,} documents are longer than a sequence and cut, "
        f"{facts['num_documents_left_out']:,} too short and left out; {seconds:.1f} s"
    ]
    if fill < LOW_FILL:
        lines.append(
            f"warning: {1 - fill:.1%} of the positions are padding: there are too few short documents to fill the "
            "holes; best_fit wastes least"
        )
    return lines
