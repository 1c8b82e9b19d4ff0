"""One sample of a run as training sees it: which documents, where their borders are, what is predicted."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from data_prep.inspect_data import marked_text
from hymba_train.config.schema import Config
from hymba_train.data.build import build_training_data, load_tokenizer
from hymba_train.data.dataset import Sample, TrainingData
from hymba_train.data.tokenizer import Tokenizer
from hymba_train.data.windows import IGNORED_LABEL
from hymba_train.errors import UserError


def sample_text(config: Config, phase: str | None, number: int, show_ids: bool = False) -> str:
    """Description and text of global sample ``number`` of a phase (None: the first).

    Args:
        show_ids: a line a token with position, segment and label instead of the text.

    Raises UserError: no such phase, number outside it, or what :func:`build_training_data` finds.
    """
    data = build_training_data(config.data, seed=config.run.seed, vocab_size=config.model.vocab_size)
    names = [p.name for p in data.phases]
    if not names:
        raise UserError("the configuration has no data.phases: choose an experiment")
    if phase is not None and phase not in names:
        raise UserError(f"--phase {phase}: there is {', '.join(names)}")
    index = names.index(phase) if phase is not None else 0
    if not 0 <= number < data.phases[index].num_samples:
        raise UserError(f"--sample {number}: phase {names[index]} has samples 0..{data.phases[index].num_samples - 1}")
    tokenizer = load_tokenizer(config.data)
    sample = data.sample(index, number)
    mark = data.sources[sample["source"]].mask is not None
    lines = _head(data, index, number, sample)
    for begin, end, document in _pieces(data, index, sample):
        lines += ["", _piece_line(sample, begin, end, document)]
        lines += _ids(sample, begin, end, tokenizer) if show_ids else [_text(sample, begin, end, tokenizer, mark)]
    return "\n".join(lines)


def _head(data: TrainingData, index: int, number: int, sample: Sample) -> list[str]:
    name, epoch, window = data.locate(index, number)
    phase, sequences = data.phases[index], data.sequences(index, name)
    num_tokens = sequences.num_tokens(window)
    what = "window" if phase.packing == "concat" else "packed sequence"
    labelled = int((sample["labels"] != IGNORED_LABEL).sum())
    mask = "documents kept apart" if data.document_mask else "no document mask: documents see one another"
    lines = [
        f"sample {number} of phase {phase.name} (seed {data.seed}): source {name}, epoch {epoch}, {what} {window} of "
        f"{len(sequences):,}, packing {phase.packing}",
        f"{phase.seq_length} inputs, {labelled} labels, {phase.seq_length - labelled} without loss; {mask}",
    ]
    if num_tokens <= phase.seq_length:
        lines.append(f"padding: inputs {num_tokens}..{phase.seq_length - 1}, no loss")
    return lines


def _pieces(data: TrainingData, index: int, sample: Sample) -> list[tuple[int, int, int | None]]:
    """(begin, end, document number or None for padding) of what lies in the S + 1 tokens, ends exclusive."""
    sequences = data.sequences(index, sample["source"])
    window = sample["window"]
    num_tokens = sequences.num_tokens(window)
    edges = [0, *sequences.borders(window).tolist(), sample["tokens"].size]
    pieces = []
    for begin, end in pairwise(edges):
        if begin < end:
            document = None
            if begin < num_tokens:
                document = sequences.part.tokens.document_at(sequences.offset(window, begin))
            pieces.append((begin, end, document))
    return pieces


def _piece_line(sample: Sample, begin: int, end: int, document: int | None) -> str:
    seq_length = sample["labels"].size
    inputs = f"inputs {begin}..{min(end, seq_length) - 1}"
    if begin == seq_length:
        inputs = f"only the label of input {begin - 1}"
    where = "padding" if document is None else f"document {document} of {sample['source']}"
    segment = ""
    if sample["segment_ids"] is not None and begin < seq_length:
        first, last = sample["positions"][begin], sample["positions"][min(end, seq_length) - 1]
        segment = f", segment {sample['segment_ids'][begin]}, positions {first}..{last}"
    without = np.flatnonzero(sample["labels"][begin : min(end, seq_length)] == IGNORED_LABEL) + begin
    loss = f", no loss at {_ranges(without.tolist())}" if without.size else ""
    return f"--- {where}: {inputs}{segment}{loss}"


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)


def _text(sample: Sample, begin: int, end: int, tokenizer: Tokenizer, mark: bool) -> str:
    tokens = sample["tokens"][begin:end]
    if not mark:
        return tokenizer.decode(tokens.tolist(), skip_special=False)
    labelled = np.concatenate([[False], sample["labels"] != IGNORED_LABEL])
    return marked_text(tokens, labelled[begin:end], tokenizer)


def _ids(sample: Sample, begin: int, end: int, tokenizer: Tokenizer) -> list[str]:
    lines = []
    for place in range(begin, min(end, sample["labels"].size)):
        token, label = int(sample["tokens"][place]), int(sample["labels"][place])
        predicted = "-" if label == IGNORED_LABEL else f"{label} {tokenizer.piece(label)!r}"
        position = place if sample["positions"] is None else int(sample["positions"][place])
        lines.append(f"{place:6d} position {position:6d}  {token:6d} {tokenizer.piece(token)!r:<20} -> {predicted}")
    return lines
