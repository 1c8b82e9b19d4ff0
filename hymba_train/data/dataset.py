"""The data of a run: phases of blended sources, addressed by global sample number.

``TrainingData.sample(phase, n)`` is a pure function of (seed, blend, phase, n): rank, world size, restarts and what was
read before play no part. So the data state of a run is (phase index, samples consumed in the phase), two numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NotRequired, TypedDict

import numpy as np

from hymba_train.data.answers import LossMask, Reference, over
from hymba_train.data.blend import Blend, WholeEpochs
from hymba_train.data.manifest import Manifest
from hymba_train.data.packs import Packs
from hymba_train.data.permutation import Permutation
from hymba_train.data.windows import IGNORED_LABEL, Sequences, TokenRange, Windows, mask_documents
from hymba_train.errors import UserError


class Sample(TypedDict):
    """One sequence with its labels. positions and segment_ids are None without a document mask."""

    reference: NotRequired[np.ndarray]
    """float32 [P, 2], for P preference pairs with a reference: log-probability of the chosen and the rejected answer,
    documents 2p and 2p + 1 of the sequence."""

    tokens: np.ndarray
    """int64 [S + 1]: inputs are [:-1]."""
    labels: np.ndarray
    """int64 [S], already shifted; -100 has no loss."""
    positions: np.ndarray | None
    """int64 [S], from 0 in each document."""
    segment_ids: np.ndarray | None
    """int64 [S], from 0, one number a document."""
    source: str
    window: int
    """Number of the window (or packed sequence) in the source's training or held-out part."""


@dataclass(frozen=True)
class Source:
    """A tokenised source, split into its training part and its held-out part (which may be empty).

    ``content_hash`` stands for the files: the manifest's, or what :func:`hymba_train.data.build.hash_of` makes of them.
    """

    name: str
    training: TokenRange
    held_out: TokenRange
    manifest: Manifest | None
    content_hash: str = ""
    mask: LossMask | None = None
    """Which tokens carry loss; None: all."""
    reference: Reference | None = None


@dataclass(frozen=True)
class Phase:
    """One phase of training, as far as data is concerned.

    Attributes:
        num_samples: sequences in the phase, tokens / seq_length rounded up.
        packing: ``concat``, or the strategy of ``packs``.
        packs: source name -> its packed sequences; empty for ``concat``.
        whole_epochs: num_samples are whole passes over the sources; what a last batch reads beyond has no labels.
    """

    name: str
    seq_length: int
    num_samples: int
    blend: Blend | WholeEpochs
    packing: str = "concat"
    packs: Mapping[str, Packs] = field(default_factory=dict)
    whole_epochs: bool = False


class TrainingData:
    """Random access to every sample of every phase, and to the held-out sequences. Made by
    :func:`hymba_train.data.build.build_training_data`.

    Args:
        sources: by name.
        phases: in the order of training.
        seed: seed of the run.
        vocab_size: every token must be below it.
        tokenizer_hash: sha256 (hex) of the tokenizer's file.
        document_mask: keep documents apart (labels, positions, segment ids).
        validation_sequences: most sequences of a held-out part that an evaluation reads.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        phases: Sequence[Phase],
        *,
        seed: int,
        vocab_size: int,
        tokenizer_hash: str = "",
        document_mask: bool = True,
        validation_sequences: int = 64,
    ) -> None:
        self.sources = dict(sources)
        self.phases = tuple(phases)
        self.seed = seed
        self.vocab_size = vocab_size
        self.tokenizer_hash = tokenizer_hash
        self.document_mask = document_mask
        self.validation_sequences = validation_sequences
        self._sequences: dict[tuple[int, str], Sequences] = {
            (index, name): (
                phase.packs[name] if name in phase.packs else Windows(self.sources[name].training, phase.seq_length)
            )
            for index, phase in enumerate(self.phases)
            for name in phase.blend.names
        }
        self._permutation = lru_cache(maxsize=64)(self._make_permutation)

    @property
    def validation_domains(self) -> tuple[str, ...]:
        """Names of the sources with a held-out part."""
        return tuple(name for name, source in self.sources.items() if source.held_out.num_tokens)

    def sequences(self, phase_index: int, source: str) -> Sequences:
        """What a phase reads from a source: its windows or packed sequences, before shuffling."""
        return self._sequences[phase_index, source]

    def _make_permutation(self, phase: str, source: str, epoch: int, num_windows: int) -> Permutation:
        return Permutation(num_windows, "windows", self.seed, phase, source, epoch)

    def locate(self, phase_index: int, n: int) -> tuple[str, int, int]:
        """(source name, epoch of that source in the phase, window number) of global sample number n >= 0."""
        phase = self.phases[phase_index]
        name, k = phase.blend[n]
        num_windows = len(self._sequences[phase_index, name])
        epoch, place = divmod(k, num_windows)
        return name, epoch, self._permutation(phase.name, name, epoch, num_windows)[place]

    def sample(self, phase_index: int, n: int) -> Sample:
        """Global sample number n of a phase, any n >= 0 in any order.

        Raises UserError when the file holds a token that the model's vocabulary does not.
        """
        name, _, window = self.locate(phase_index, n)
        sample = self.read(phase_index, name, window)
        phase = self.phases[phase_index]
        if phase.whole_epochs and n >= phase.num_samples:
            sample["labels"] = np.full_like(sample["labels"], IGNORED_LABEL)
        return sample

    def read(self, phase_index: int, source: str, window: int) -> Sample:
        """One window or packed sequence of a source by its number there, as a phase reads it."""
        return self._read(source, self._sequences[phase_index, source], window)

    def _read(self, name: str, sequences: Sequences, window: int) -> Sample:
        tokens = sequences.read(window)
        if tokens.max() >= self.vocab_size or tokens.min() < 0:
            raise self._outside_vocabulary(tokens, sequences, window)
        sample: Sample = {
            "tokens": tokens,
            "labels": tokens[1:],
            "positions": None,
            "segment_ids": None,
            "source": name,
            "window": window,
        }
        if self.document_mask:
            masked = mask_documents(tokens, sequences.borders(window))
            sample["labels"] = masked["labels"]
            sample["positions"], sample["segment_ids"] = masked["positions"], masked["segment_ids"]
        if (num_tokens := sequences.num_tokens(window)) < tokens.size:
            sample["labels"] = sample["labels"].copy()
            sample["labels"][num_tokens - 1 :] = IGNORED_LABEL
        source = self.sources[name]
        if source.mask is not None:
            is_answer = over(sequences, source.mask).read(window)[1:] == 1
            sample["labels"] = np.where(is_answer, sample["labels"], IGNORED_LABEL)
        if source.reference is not None and isinstance(sequences, Packs):
            documents = np.array(sequences.first_documents(window))
            sample["reference"] = source.reference.values[np.stack([documents, documents + 1], axis=1)]
        return sample

    def _outside_vocabulary(self, tokens: np.ndarray, sequences: Sequences, window: int) -> UserError:
        place = int(np.argmax((tokens >= self.vocab_size) | (tokens < 0)))
        source, offset = sequences.part.tokens, sequences.offset(window, place)
        return UserError(
            f"{source.prefix}.bin: token {offset} (byte {offset * source.dtype.itemsize}) is {tokens[place]}, outside "
            f"the model's vocabulary of {self.vocab_size}: was it made with another tokenizer?"
        )

    def num_validation_samples(self, domain: str, seq_length: int) -> int:
        """Sequences that an evaluation of this domain reads."""
        return min(self.validation_sequences, len(self._held_out(domain, seq_length)))

    def validation_sample(self, domain: str, seq_length: int, index: int) -> Sample:
        """Held-out sequence ``index`` of a domain: windows spread evenly over the held-out part, always the same."""
        windows = self._held_out(domain, seq_length)
        count = self.num_validation_samples(domain, seq_length)
        return self._read(domain, windows, index * len(windows) // count)

    def _held_out(self, domain: str, seq_length: int) -> Windows:
        if domain not in self.validation_domains:
            raise UserError(f"no validation domain {domain}; there are {', '.join(self.validation_domains) or 'none'}")
        windows = Windows(self.sources[domain].held_out, seq_length)
        if not len(windows):
            raise UserError(
                f"data.sources.{domain}: the held-out part has {windows.part.num_tokens} tokens, too few for a "
                f"sequence of {seq_length}: raise validation_fraction"
            )
        return windows

    def identity(self) -> dict[str, Any]:
        """Everything that decides order and content of the samples, as plain data for a checkpoint to keep.

        :func:`hymba_train.data.identity.changes` compares two of them. Lengths and batch sizes of phases are left out:
        they decide how far the order is walked, not what it is.
        """
        phases = [
            {
                "name": phase.name,
                "seq_length": phase.seq_length,
                "packing": phase.packing,
                "packs": {name: packs.facts["payload_sha256"] for name, packs in sorted(phase.packs.items())},
                "blend": dict(zip(phase.blend.names, map(str, phase.blend.shares), strict=True)),
            }
            for phase in self.phases
        ]
        sources = {
            name: {"files": source.content_hash, "training_tokens": source.training.num_tokens}
            for name, source in self.sources.items()
        }
        return {
            "tokenizer": self.tokenizer_hash,
            "seed": self.seed,
            "document_mask": self.document_mask,
            "phases": phases,
            "sources": sources,
        }

    def describe(self) -> list[str]:
        """Lines for the log: what each source holds, and how often each phase goes through it."""
        lines = []
        for name, source in self.sources.items():
            held_out = source.held_out
            lines.append(
                f"source {name}: {source.training.num_tokens:,} tokens in {source.training.num_documents:,} documents"
                + (f", held out {held_out.num_tokens:,} in {held_out.num_documents:,}" if held_out.num_tokens else "")
                + ("" if source.manifest else "; no manifest, so the tokenizer it was made with is unknown")
            )
        for index, phase in enumerate(self.phases):
            parts = []
            counts = phase.blend.counts_before(phase.num_samples)
            for name, share in zip(phase.blend.names, phase.blend.shares, strict=True):
                epochs = counts[name] / len(self._sequences[index, name])
                parts.append(f"{name} {float(share):.1%} ({epochs:.2f} epochs)")
            packing = "" if phase.packing == "concat" else f", {phase.packing}"
            lines.append(
                f"phase {phase.name}: {phase.num_samples:,} sequences of {phase.seq_length} tokens{packing}; "
                f"{', '.join(parts)}"
            )
        return lines
