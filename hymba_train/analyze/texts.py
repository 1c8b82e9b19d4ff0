"""The text that a model is looked at with: sequences of token ids, by domain."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hymba_train.errors import UserError

if TYPE_CHECKING:
    from hymba_train.convert.load import LoadedModel

SHORTEST = 2  # tokens: one to predict from, one to predict


def read_texts(loaded: LoadedModel, args: argparse.Namespace) -> dict[str, list[Tensor]]:
    """Domain -> at most ``args.sequences`` sequences [S], S at most ``args.length``, ids on the CPU.

    From ``args.text`` (a domain a file) or from the validation domains of a run: ``args.data``, or the model's own.
    Raises UserError.
    """
    if args.text and (args.data or args.data_path):
        raise UserError("--text: is given instead of --data and --data-path; leave one out")
    texts = _files(loaded, args) if args.text else _held_out(loaded, args)
    largest = max(int(sequence.max()) for sequences in texts.values() for sequence in sequences)
    if largest >= loaded.model.config.vocab_size:
        raise UserError(
            f"token {largest} of the text is not in the model's vocabulary of {loaded.model.config.vocab_size}"
        )
    return texts


def _files(loaded: LoadedModel, args: argparse.Namespace) -> dict[str, list[Tensor]]:
    tokenizer = loaded.require_tokenizer()
    texts: dict[str, list[Tensor]] = {}
    length = min(args.length, loaded.model.config.max_position_embeddings)
    for path in args.text:
        try:
            ids = tokenizer.encode(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {path}: cannot be read ({error})") from error
        name = path.stem if path.stem not in texts else str(path)
        first = [loaded.token_ids.bos] if loaded.adds_bos else []
        step = length - len(first)
        cuts = [first + ids[i : i + step] for i in range(0, min(len(ids), args.sequences * step), step)]
        pieces = [torch.tensor(cut) for cut in cuts if len(cut) >= SHORTEST]
        whole = [piece for piece in pieces if len(piece) == length]  # a rest would weigh as much as a whole one
        if not pieces:
            raise UserError(f"--text {path}: holds {len(ids)} tokens; give a text of at least {SHORTEST}")
        texts[name] = whole or pieces
    return texts


def _held_out(loaded: LoadedModel, args: argparse.Namespace) -> dict[str, list[Tensor]]:
    from hymba_train.convert.source import TrainingCheckpoint
    from hymba_train.data.batches import validation_batches
    from hymba_train.data.build import build_training_data

    run = loaded.checkpoint if args.data is None else TrainingCheckpoint.find(Path(args.data))
    if run is None:
        raise UserError("--data: an exported directory has no text; name a run whose held-out text to take, or --text")
    if run.phase is None:
        raise UserError(f"{run.path}: this checkpoint was imported and has no data; give --data RUN, or --text")
    if args.data_path is not None:
        run.config.data.path = args.data_path
    data = build_training_data(run.config.data, seed=run.config.run.seed, vocab_size=run.config.model.vocab_size)
    if not data.validation_domains:
        raise UserError("data.sources: none has a validation_fraction; give --text")
    texts: dict[str, list[Tensor]] = {}
    for domain in data.validation_domains:
        rows: list[Tensor] = []
        for batch in validation_batches(data, domain, run.phase.seq_length, micro_batch_size=1):
            if "segment_ids" in batch:  # documents that the model saw apart are sequences of their own
                lengths = torch.unique_consecutive(batch["segment_ids"][0], return_counts=True)[1].tolist()
                rows += batch["tokens"][0].split(lengths)
            else:
                rows.append(batch["tokens"][0])
        longest = sorted((row[: args.length].long() for row in rows), key=len, reverse=True)
        texts[domain] = [row for row in longest[: args.sequences] if len(row) >= SHORTEST]
        if not texts[domain]:
            raise UserError(f"{domain}: no held-out document has {SHORTEST} tokens; give --text")
    return texts
