"""From the configuration to :class:`TrainingData`, with every check that can be made before the first step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_train.data.answers import LossMask, Reference, reference_path
from hymba_train.data.blend import Blend, WholeEpochs
from hymba_train.data.dataset import Phase, Source, TrainingData
from hymba_train.data.indexed import IndexedTokens, bin_path, idx_path
from hymba_train.data.manifest import Manifest, check_spots, read_manifest, spot_hashes
from hymba_train.data.packs import Packs, verify_packs
from hymba_train.data.storage import Cache, exists, is_url, join
from hymba_train.data.tokenizer import Tokenizer
from hymba_train.data.windows import Windows, split_held_out
from hymba_train.errors import UserError
from hymba_train.plan.recall import SOURCE_KIND

if TYPE_CHECKING:  # tokenizing processes import this package, and need no Hydra
    from hymba_train.config.schema import DataConfig, PhaseConfig, SourceConfig


def resolve_path(config: DataConfig, path: str) -> str:
    """``path``, taken from data.path when it is relative and data.path is given. May be a URL."""
    return join(config.path, path)


def load_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer of a run, through the cache if it is remote. Raises UserError."""
    path = resolve_path(config, config.tokenizer)
    if not is_url(path):
        return Tokenizer.load(path)
    if not path.endswith((".json", ".model")):
        names = (f"{path.rstrip('/')}/{name}" for name in ("tokenizer.json", "tokenizer.model"))
        path = next((name for name in names if exists(name)), path)
    return Tokenizer.load(_cache(config, path).file(path))


def build_training_data(
    config: DataConfig, *, seed: int, vocab_size: int, references: bool = True
) -> TrainingData:  # fmt: skip
    """Open all sources of a run and check them.

    Args:
        config: the ``data`` group.
        seed: ``run.seed``.
        vocab_size: ``model.vocab_size``, V.
        references: open the log-probabilities beside preference pairs, where there are some. Whoever is about to make
            them does not: those of other pairs would be refused.

    Raises UserError with one line a problem: missing or damaged files, vocabulary or tokenizer mismatch, a blend that
    names an unknown source, a source too short for one sequence, a packing that was not made.
    """
    tokenizer = load_tokenizer(config)
    problems = []
    if tokenizer.vocab_size != vocab_size:
        problems.append(
            f"model.vocab_size is {vocab_size}, but the tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens: "
            "set model.vocab_size or data.tokenizer"
        )
    sources: dict[str, Source] = {}
    for name, source in config.sources.items():
        try:
            sources[name] = open_source(config, name, source, tokenizer, references)
        except UserError as error:
            problems.extend(error.problems)
    phases = []
    for name, phase in config.phases.items():
        try:
            phases.append(_open_phase(config, name, phase, sources, seed, tokenizer.eod_id))
        except UserError as error:
            problems.extend(error.problems)
    if problems:
        raise UserError(*problems)
    data = TrainingData(
        sources,
        phases,
        seed=seed,
        vocab_size=vocab_size,
        tokenizer_hash=tokenizer.content_hash,
        document_mask=config.document_mask,
        validation_sequences=config.validation_sequences,
    )
    for domain in data.validation_domains:
        for opened in phases:
            data.num_validation_samples(domain, opened.seq_length)  # raises when the held-out part is too short
    return data


def open_source(
    config: DataConfig, name: str, source: SourceConfig, tokenizer: Tokenizer, references: bool = True
) -> Source:
    """One source, checked against its manifest and ``tokenizer``; from its local copy if it is remote.

    Raises UserError naming the key or the file that is at fault.
    """
    key, prefix = f"data.sources.{name}", resolve_path(config, source.path)
    if not 0 <= source.validation_fraction < 1:
        raise UserError(f"{key}.validation_fraction = {source.validation_fraction}: give a share in 0..1, below 1")
    if is_url(prefix):
        prefix = _cache(config, prefix).source(prefix)
    for path in (bin_path(prefix), idx_path(prefix)):
        if not path.is_file():
            raise UserError(
                f"{key}.path: {path} does not exist; make it with `hymba data tokenize --input {name}.jsonl "
                f"--tokenizer {resolve_path(config, config.tokenizer)} --output-prefix {prefix}` (the bundled demo: "
                f"`hymba data prepare-demo --output {Path(prefix).parent}`)"
            )
    tokens = IndexedTokens(prefix)
    manifest = read_manifest(prefix)
    mask = reference = None
    if manifest is not None:
        _check_manifest(tokens, manifest, tokenizer)
        if manifest.chat is not None:
            mask = _open_chat(config, key, source, prefix, manifest)
            if references and manifest.documents_per_piece > 1 and reference_path(prefix).is_file():
                reference = Reference(prefix)
    training, held_out = split_held_out(tokens, source.validation_fraction)
    if not training.num_tokens:
        raise UserError(
            f"{key}: {tokens.num_documents} documents, validation_fraction {source.validation_fraction}: nothing is "
            "left to train on (whole documents are held out); lower validation_fraction"
        )
    content_hash = hash_of(tokens, manifest)
    if reference is not None:
        if reference.facts.get("source") != content_hash or reference.values.size != tokens.num_documents:
            raise UserError(
                f"{key}: {reference_path(prefix)} was made for another {prefix}.bin: run `hymba reference` again"
            )
        content_hash = hashlib.sha256(f"{content_hash}{reference.facts['sha256']}".encode()).hexdigest()
    return Source(name, training, held_out, manifest, content_hash, mask, reference)


def _open_chat(config: DataConfig, key: str, source: SourceConfig, prefix: str, manifest: Manifest) -> LossMask:
    """The mask that lies beside a source of conversations. Raises UserError."""
    if is_url(resolve_path(config, source.path)):
        raise UserError(f"{key}.path={source.path}: conversations are read from a local disk alone; copy them there")
    assert manifest.chat is not None
    if not config.document_mask:
        raise UserError(
            f"data.document_mask=false: {manifest.chat['kind']} must not see one another; set data.document_mask=true"
        )
    if manifest.documents_per_piece > 1 and source.validation_fraction:
        raise UserError(
            f"{key}.validation_fraction={source.validation_fraction}: pairs cannot be held out; set it to 0, or name a "
            "source of conversations for validation"
        )
    return LossMask(prefix, manifest.chat["mask"])


def hash_of(tokens: IndexedTokens, manifest: Manifest | None) -> str:
    """What stands for a source's files: the manifest's hashes, or those of some blocks where there is no manifest."""
    if manifest is not None:
        return manifest.content_hash
    spots = [spot_hashes(path) for path in (bin_path(tokens.prefix), idx_path(tokens.prefix))]
    return hashlib.sha256(repr((tokens.num_tokens, tokens.num_documents, spots)).encode()).hexdigest()


def _cache(config: DataConfig, url: str) -> Cache:
    if config.cache is None:
        raise UserError(f"{url} is remote: set data.cache to a directory on a local disk with room for a copy")
    return Cache(config.cache)


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
    for path in (bin_path(tokens.prefix), idx_path(tokens.prefix)):
        check_spots(path, manifest.file(path.suffix))


def _open_phase(
    config: DataConfig, name: str, phase: PhaseConfig, sources: Mapping[str, Source], seed: int, pad_id: int
) -> Phase:
    key = f"data.phases.{name}"
    blend: Blend | WholeEpochs = Blend(phase.blend, seed, name)
    unknown = [source for source in blend.names if source not in config.sources]
    if unknown:
        known = ", ".join(config.sources) or "none"
        raise UserError(*(f"{key}.blend.{source}: no such source; data.sources has {known}" for source in unknown))
    if phase.min_document_tokens and phase.packing == "concat":
        raise UserError(
            f"{key}.min_document_tokens={phase.min_document_tokens} has no effect on packing=concat: set "
            f"{key}.packing=best_fit or length_buckets, or leave it out"
        )
    packs: dict[str, Packs] = {}
    for source in blend.names:
        if source not in sources:
            continue  # could not be opened: reported already
        if phase.packing != "concat":
            packs[source] = open_packs(config, phase, sources[source], pad_id)
            continue
        part = sources[source].training
        if sources[source].mask is not None and not _fits_whole(sources[source], phase):
            facts = _chat_facts(sources[source])
            if facts["kind"] == SOURCE_KIND:
                raise UserError(
                    f"{key}.seq_length={phase.seq_length} would cut documents of {source}, made for sequences of "
                    f"{facts['seq_length']}: set that, or run `hymba data recall --seq-length {phase.seq_length}`"
                )
            raise UserError(
                f"{key}.packing=concat would cut the conversations of {source}: set {key}.packing=best_fit, and run "
                "`hymba data pack`"
            )
        if not len(Windows(part, phase.seq_length)):
            raise UserError(
                f"{key}: source {source} has {part.num_tokens} tokens to train on, too few for one sequence of "
                f"{phase.seq_length}"
            )
    num_samples = 0  # where sources could not be opened
    if phase.epochs is None:
        num_samples = -(-phase.tokens // phase.seq_length)
    elif len(packs) == len(blend.names):
        blend = WholeEpochs({source: len(packs[source]) for source in packs}, seed, name)
        num_samples = phase.epochs * blend.epoch_samples
        if phase.tokens != phase.tokens_of(num_samples):
            raise UserError(
                f"{key}.tokens={phase.tokens}: {phase.epochs} epochs of its packed sequences are "
                f"{phase.tokens_of(num_samples)}; leave {key}.tokens out, or set that"
            )
    return Phase(
        name, phase.seq_length, num_samples, blend, phase.packing, packs, whole_epochs=phase.epochs is not None
    )


def _chat_facts(source: Source) -> dict[str, Any]:
    """Of a source with a loss mask, which is opened only where its manifest has them."""
    assert source.manifest is not None and source.manifest.chat is not None
    return source.manifest.chat


def _fits_whole(source: Source, phase: PhaseConfig) -> bool:
    """Whether plain concatenation cuts none of its documents: recall tasks fill blocks of their sequence length."""
    facts = _chat_facts(source)
    return facts["kind"] == SOURCE_KIND and facts["seq_length"] == phase.seq_length


def open_packs(config: DataConfig, phase: PhaseConfig, source: Source, pad_id: int) -> Packs:
    """The packing of one source for one phase. Raises UserError if it was not made, or for other data."""
    path = pack_location(config, phase, source)
    if is_url(path):
        if not exists(path):
            raise UserError(
                f"{path} does not exist: build it once, offline, with `hymba data pack` and the overrides of this run "
                "(a job never builds it)"
            )
        path = str(_cache(config, path).file(path, verify_packs))
    together = 1 if source.manifest is None else source.manifest.documents_per_piece
    packs = Packs(source.training, path, phase.packing, phase.seq_length, phase.min_document_tokens, pad_id, together)
    if source.mask is not None and packs.facts["num_documents_cut"]:
        raise UserError(
            f"data.sources.{source.name}: {packs.facts['num_documents_cut']} conversations (or pairs) are longer than "
            f"the phase's seq_length={phase.seq_length} and would be cut: run `hymba data chat --seq-length "
            f"{phase.seq_length}`, or set a longer seq_length"
        )
    return packs


def pack_location(config: DataConfig, phase: PhaseConfig, source: Source) -> str:
    """Where the packing of a source for a phase belongs, beside the source itself: a path or a URL."""
    return f"{resolve_path(config, config.sources[source.name].path)}{phase.pack_suffix}"
