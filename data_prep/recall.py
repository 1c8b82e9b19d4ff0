"""``hymba data recall``: a source of recall tasks, to be trained on beside text.

The documents are those of :mod:`hymba_train.evaluation.recall` from its training stream, so none of them is in an
evaluation. They fill blocks of ``seq_length`` tokens exactly (one document, or 2, 4, 8, 16 shorter ones of one kind),
and training with packing=concat reads such a source block by block: no document is cut, no answer loses its context.

Loss is on what can be known alone (PREFIX.mask): answers, and the haystack's sentence from its second time on. The rest
is random, and its gradient noise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import hymba_train
from data_prep.merge import refuse_to_overwrite
from data_prep.tokenize_shard import tokenizer_facts
from hymba_train.config.recall_kinds import RECALL_KINDS
from hymba_train.data.answers import MaskWriter, mask_path
from hymba_train.data.indexed import token_dtype
from hymba_train.data.indexed_writer import IndexedWriter
from hymba_train.data.manifest import Manifest, manifest_path, read_manifest
from hymba_train.data.tokenizer import Tokenizer
from hymba_train.errors import UserError
from hymba_train.evaluation.recall import TRAINING, Sample, draw
from hymba_train.evaluation.symbols import Symbols, choose_symbols
from hymba_train.plan.recall import SOURCE_KIND, most_items

SHORTEST_DOCUMENT = 32
HALVINGS = 4
MOST_NEEDLES = 8
FEW_ITEMS = 4
"""Half of the documents hold no more: matching keys is learnt from such ones first."""


def write_recall(
    prefix: str | Path, tokenizer: str | Path, num_tokens: int, seq_length: int, *, seed: int = 1,
    num_symbols: int = 256, separators: Sequence[int] = (), kinds: Sequence[str] = tuple(RECALL_KINDS),
    overwrite: bool = False,
) -> tuple[Manifest, dict[str, int]]:  # fmt: skip
    """Write PREFIX.bin, .idx and .json with at least ``num_tokens`` tokens; returns (manifest, documents by kind).

    Items are drawn uniformly up to what fits, in half of the documents up to FEW_ITEMS. Output of the same settings is
    left as it is. Raises UserError.
    """
    if seq_length < SHORTEST_DOCUMENT or num_tokens < seq_length:
        raise UserError(f"--tokens {num_tokens} --seq-length {seq_length}: at least {SHORTEST_DOCUMENT}, and one block")
    loaded = Tokenizer.load(tokenizer)
    symbols = choose_symbols(loaded, num_symbols, separators)
    num_blocks = -(-num_tokens // seq_length)
    settings = {
        "name": "recall", "blocks": num_blocks, "seq_length": seq_length, "seed": seed, "num_symbols": num_symbols,
        "separators": [symbols.equals, symbols.end, symbols.ask, symbols.blank], "kinds": list(kinds), "loss": "known",
        "text_bytes": 0,
    }  # fmt: skip
    before = read_manifest(prefix)
    if before is not None and mask_path(prefix).is_file():
        facts, documents = dict(before.inputs[0]), before.inputs[0].get("documents")
        facts.pop("documents", None)
        if facts == settings:
            return before, documents
    refuse_to_overwrite(Path(prefix), overwrite)
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    largest = -1
    dtype = token_dtype(loaded.vocab_size)
    with IndexedWriter(prefix, dtype) as writer, MaskWriter(prefix) as mask:
        for block in range(num_blocks):
            kind, documents = _block(block, seed, seq_length, kinds, symbols)
            tokens = np.concatenate([d.tokens for d in documents])
            writer.add_documents(tokens.astype(dtype), np.array([d.tokens.size for d in documents]))
            mask.add(np.concatenate([d.known for d in documents]))
            counts[kind] += len(documents)
            largest = max(largest, int(tokens.max()))
        manifest_path(prefix).unlink(missing_ok=True)
        files = writer.publish()
        chat = {
            "kind": SOURCE_KIND, "seq_length": seq_length, "num_answer_tokens": mask.num_answer_tokens,
            "num_too_long": 0, "num_cut": 0, "mask": mask.publish(),
        }  # fmt: skip
        facts = Manifest(
            num_tokens=writer.num_tokens, num_documents=writer.num_documents, dtype=str(dtype), max_token_id=largest,
            append_eod=True,
            tokenizer=tokenizer_facts(loaded), files=files,
            inputs=[{**settings, "documents": dict(counts)}],
            chat=chat,
            versions={"hymba_train": hymba_train.__version__, "numpy": np.__version__},
        )  # fmt: skip
    facts.write(prefix)
    return facts, dict(counts)


def _block(number: int, seed: int, seq_length: int, kinds: Sequence[str], symbols: Symbols) -> tuple[str, list[Sample]]:
    """Kind and documents of one block of ``seq_length`` tokens."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([TRAINING, seed, number])))
    kind = kinds[int(rng.integers(len(kinds)))]
    lengths = [
        seq_length >> i
        for i in range(HALVINGS + 1)
        if seq_length % (1 << i) == 0 and seq_length >> i >= SHORTEST_DOCUMENT and most_items(kind, seq_length >> i)
    ]
    if not lengths:
        raise UserError(f"--seq-length {seq_length}: too short for {kind}")
    length = lengths[int(rng.integers(len(lengths)))]
    most = most_items(kind, length)
    most = min(most, {"needle": MOST_NEEDLES, "mqar": symbols.keys.size}.get(kind, most))
    documents = []
    for i in range(seq_length // length):
        top = most + 1 if rng.integers(2) else min(most, FEW_ITEMS) + 1
        items = int(rng.integers(1, top))
        documents.append(draw(TRAINING, seed, kind, length, items, number * seq_length + i, symbols))
    return kind, documents
