"""Supervised fine-tuning and DPO: phases of whole epochs, and what must lie beside their data before a job starts."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from hymba_train.config.freeze import data_file
from hymba_train.config.schema import TO_BE_GIVEN, Config, PhaseConfig
from hymba_train.plan.paths import is_url, tokenizer_file
from hymba_train.plan.recall import SOURCE_KIND

_TAIL = struct.Struct("<Q8s")  # of a .pack file, see hymba_train.data.packs
_SPOT_BYTES = 2**16
_KINDS = {"sft": "conversations", "dpo": "pairs"}


def fill_in_epochs(config: Config) -> None:
    """Give phases of whole epochs their ``tokens``, as far as the packings of their sources have been made."""
    for phase in config.data.phases.values():
        if phase.epochs is None or phase.tokens != TO_BE_GIVEN or phase.pack_suffix is None:
            continue
        if TO_BE_GIVEN in (config.data.path, phase.seq_length, phase.global_batch_size) or phase.global_batch_size < 1:
            continue
        names = [name for name, weight in phase.blend.items() if weight > 0 and name in config.data.sources]
        paths = [config.data.sources[name].path for name in names]
        found = [_num_sequences(config, path, phase) for path in paths if path != TO_BE_GIVEN]
        counts = [count for count in found if count is not None]
        if names and len(counts) == len(names):
            phase.tokens = phase.tokens_of(phase.epochs * sum(counts))


def _num_sequences(config: Config, path: str, phase: PhaseConfig) -> int | None:
    try:
        with open(f"{data_file(config.data, path)}{phase.pack_suffix}", "rb") as stream:
            stream.seek(-_TAIL.size, 2)
            length, _ = _TAIL.unpack(stream.read(_TAIL.size))
            stream.seek(-_TAIL.size - length, 2)
            return int(json.loads(stream.read(length))["num_sequences"])
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None  # not made yet, or damaged: check_files and the loader say so


def check_epochs(key: str, phase: PhaseConfig) -> list[str]:
    """A phase of whole epochs is packed, and has one batch size. Expects given numbers."""
    if phase.epochs is None:
        return []
    problems = []
    if phase.packing == "concat":
        problems.append(f"{key}.epochs={phase.epochs} needs a packing: set {key}.packing=best_fit, or set epochs=null")
    if phase.rampup_batch_size is not None:
        problems.append(f"{key}.rampup_batch_size: not in a phase of whole epochs; set it to null, or epochs=null")
    return problems


def check_objective(config: Config) -> list[str]:
    """What run.objective asks of the other keys."""
    problems, objective = [], config.run.objective
    if objective != "pretrain" and not config.data.document_mask:
        problems.append(
            f"data.document_mask=false: run.objective={objective} packs conversations, which must not see one another; "
            "set data.document_mask=true"
        )
    if objective == "dpo" and config.checkpoint.load is None:
        problems.append("checkpoint.load: to be given with run.objective=dpo: the model that it starts from")
    return problems


def check_conversations(config: Config, needs_reference: bool = True) -> list[str]:
    """Sources in a phase's blend against the objective, by their manifests; one line a problem.

    Looks at files: mask and reference must be there, and the tokenizer must be the one that the masks were made with.
    """
    data, wanted = config.data, _KINDS.get(config.run.objective)
    names = {name for phase in data.phases.values() for name, weight in phase.blend.items() if weight > 0}
    problems: list[str] = []
    for name in sorted(names & set(data.sources)):
        path = data.sources[name].path
        if path == TO_BE_GIVEN or data.path == TO_BE_GIVEN or is_url(f"{data.path}{path}"):
            continue
        prefix = data_file(data, path)
        if Path(f"{prefix}.idx").is_file():
            problems += _check_source(config, name, prefix, wanted, needs_reference)
    return problems


def _check_source(config: Config, name: str, prefix: Path, wanted: str | None, needs_reference: bool) -> list[str]:
    key, manifest = f"data.sources.{name}.path={config.data.sources[name].path}", _manifest(prefix)
    kind = (manifest.get("chat") or {}).get("kind")
    objective = config.run.objective
    if wanted is None:
        if kind in (None, SOURCE_KIND):
            return []
        objective = next(o for o, k in _KINDS.items() if k == kind)
        return [
            f"{key}: {kind} made by `hymba data chat`; set run.objective={objective}, or name a source of plain text"
        ]
    if kind != wanted:
        pairs = " --pairs" if wanted == "pairs" else ""
        return [
            f"{key}: run.objective={objective} needs {wanted} with a loss mask, these are {kind or 'plain text'}; make "
            f"them with `hymba data chat{pairs}`"
        ]
    problems = []
    mask = Path(f"{prefix}.mask")
    if not mask.is_file():
        problems.append(f"{key}: no {mask}, the loss mask; run `hymba data chat` again, or copy it there")
    elif _differs(mask, manifest["chat"].get("mask", {})):
        problems.append(
            f"{key}: {mask} is not the loss mask of its manifest; run `hymba data chat` again, or copy both"
        )
    if wanted == "pairs" and needs_reference and not Path(f"{prefix}.reference").is_file():
        problems.append(
            f"{key}: no {prefix}.reference, the log-probabilities of the start model; run `hymba reference` with the "
            "overrides of this run"
        )
    return problems + _check_tokenizer(config, key, manifest)


def _differs(path: Path, facts: dict[str, Any]) -> bool:
    """Whether a file has another size, or other blocks, than its manifest says (hymba_train.data.manifest)."""
    if path.stat().st_size != facts.get("bytes"):
        return True
    with open(path, "rb") as stream:
        for offset, expected in facts["spots"]:
            stream.seek(offset)
            if hashlib.blake2b(stream.read(_SPOT_BYTES), digest_size=8).hexdigest() != expected:
                return True
    return False


def _check_tokenizer(config: Config, key: str, manifest: dict[str, Any]) -> list[str]:
    given = config.data.tokenizer
    if given == TO_BE_GIVEN or is_url(given):
        return []
    path = tokenizer_file(data_file(config.data, given))
    made_with = manifest.get("tokenizer", {}).get("sha256")
    if path is None or hashlib.sha256(path.read_bytes()).hexdigest() == made_with:
        return []
    return [
        f"{key}: tokens and mask were made with another tokenizer than data.tokenizer={given}; set that, or run `hymba "
        "data chat` again with it"
    ]


def _manifest(prefix: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(Path(f"{prefix}.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}
