"""From the configuration to :class:`TrainingData`, with every check that can be made before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hymba_train.data.blend import Blend
from hymba_train.data.dataset import Phase, Source, TrainingData
from hymba_train.data.indexed import IndexedTokens, bin_path, idx_path
from hymba_train.data.manifest import Manifest, read_manifest
from hymba_train.data.tokenizer import Tokenizer
from hymba_train.data.windows import Windows, split_held_out
from hymba_train.errors import UserError

if TYPE_CHECKING:  # tokenizing processes import this package, and need no Hydra
    from hymba_train.config.schema import DataConfig, PhaseConfig, SourceConfig


def resolve_path(config: DataConfig, path: str) -> str:
    """``path``, taken from data.path when it is relative and data.path is given."""
    return str(Path(config.path, path)) if config.path else path


def build_training_data(config: DataConfig, *, seed: int, vocab_size: int) -> TrainingData:
    """Open all sources of a run and check them.

    Args:
        config: the ``data`` group.
        seed: ``run.seed``.
        vocab_size: ``model.vocab_size``, V.

    Raises UserError with one line a problem: missing or damaged files, vocabulary or tokenizer mismatch, a blend that
    names an unknown source, a source too short for one sequence.
    """
    tokenizer = Tokenizer.load(resolve_path(config, config.tokenizer))
    problems = []
    if tokenizer.vocab_size != vocab_size:
        problems.append(
            f"model.vocab_size is {vocab_size}, but the tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens: "
            "set model.vocab_size or data.tokenizer"
        )
    sources: dict[str, Source] = {}
    for name, source in config.sources.items():
        try:
            sources[name] = _open_source(config, name, source, tokenizer)
        except UserError as error:
            problems.extend(error.problems)
    phases = []
    for name, phase in config.phases.items():
        try:
            phases.append(_open_phase(config, name, phase, sources, seed))
        except UserError as error:
            problems.extend(error.problems)
    if problems:
        raise UserError(*problems)
    data = TrainingData(
        sources,
        phases,
        seed=seed,
        vocab_size=vocab_size,
        document_mask=config.document_mask,
        validation_sequences=config.validation_sequences,
    )
    for domain in data.validation_domains:
        for phase in phases:
            data.num_validation_samples(domain, phase.seq_length)  # raises when the held-out part is too short
    return data


def _open_source(config: DataConfig, name: str, source: SourceConfig, tokenizer: Tokenizer) -> Source:
    key, prefix = f"data.sources.{name}", resolve_path(config, source.path)
    if not 0 <= source.validation_fraction < 1:
        raise UserError(f"{key}.validation_fraction = {source.validation_fraction}: give a share in 0..1, below 1")
    for path in (bin_path(prefix), idx_path(prefix)):
        if not path.is_file():
            raise UserError(
                f"{key}.path: {path} does not exist; make it with `hymba data tokenize --input {name}.jsonl "
                f"--tokenizer {resolve_path(config, config.tokenizer)} --output-prefix {prefix}` (the bundled demo: "
                f"`hymba data prepare-demo --output {Path(prefix).parent}`)"
            )
    tokens = IndexedTokens(prefix)
    manifest = read_manifest(prefix)
    if manifest is not None:
        _check_manifest(tokens, manifest, tokenizer)
    training, held_out = split_held_out(tokens, source.validation_fraction)
    if not training.num_tokens:
        raise UserError(
            f"{key}: {tokens.num_documents} documents, validation_fraction {source.validation_fraction}: nothing is "
            "left to train on (whole documents are held out); lower validation_fraction"
        )
    return Source(name, training, held_out, manifest)


def _check_manifest(tokens: IndexedTokens, manifest: Manifest, tokenizer: Tokenizer) -> None:
    made_with = manifest.tokenizer
    if made_with["vocab_size"] != tokenizer.vocab_size:
        raise UserError(
            f"{tokens.prefix}.bin was made with a vocabulary of {made_with['vocab_size']}, but the tokenizer "
            f"{tokenizer.path} has {tokenizer.vocab_size} tokens: tokenise it again or set data.tokenizer"
        )
    if made_with["sha256"] != tokenizer.content_hash:
        raise UserError(
            f"{tokens.prefix}.bin was made with another tokenizer (sha256 {made_with['sha256'][:12]}) than "
            f"{tokenizer.path} (sha256 {tokenizer.content_hash[:12]}): tokenise it again or set data.tokenizer"
        )
    facts = (tokens.num_tokens, tokens.num_documents, str(tokens.dtype))
    expected = (manifest.num_tokens, manifest.num_documents, manifest.dtype)
    if facts != expected:
        raise UserError(
            f"{tokens.prefix}.idx has {facts[0]} tokens in {facts[1]} documents ({facts[2]}), but its manifest "
            f"{tokens.prefix}.json says {expected[0]} in {expected[1]} ({expected[2]}): tokenise it again"
        )


def _open_phase(
    config: DataConfig, name: str, phase: PhaseConfig, sources: Mapping[str, Source], seed: int
) -> Phase:
    key = f"data.phases.{name}"
    blend = Blend(phase.blend, seed, name)
    unknown = [source for source in blend.names if source not in config.sources]
    if unknown:
        known = ", ".join(config.sources) or "none"
        raise UserError(*(f"{key}.blend.{source}: no such source; data.sources has {known}" for source in unknown))
    for source in blend.names:
        if source not in sources:
            continue  # could not be opened: reported already
        part = sources[source].training
        if not len(Windows(part, phase.seq_length)):
            raise UserError(
                f"{key}: source {source} has {part.num_tokens} tokens to train on, too few for one sequence of "
                f"{phase.seq_length}"
            )
    return Phase(name, phase.seq_length, -(-phase.tokens // phase.seq_length), blend)
