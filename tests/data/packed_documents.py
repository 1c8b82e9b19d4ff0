"""Packs of documents made by the data code itself, and what a model makes of them: for the leak tests."""

from __future__ import annotations

import numpy as np
import torch

from hymba_train.config.schema import Config, ModelConfig
from hymba_train.data.windows import mask_documents

EOD = 1
VOCAB_SIZE = 61
SEQ_LENGTH = 43  # odd: rows must be padded under sequence parallelism
# Documents longer and shorter than the window of 5, one of a single input, one that goes on beyond the sequence.
LENGTHS = ([13, 2, 19, 10], [1, 25, 18])
CHANGED = (2, 1)  # the document of each row that the leak test changes

MODEL = dict(
    # Heads of 16, the smallest that FlexAttention takes on a GPU.
    name="packed", num_layers=4, hidden_size=64, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2,
    vocab_size=VOCAB_SIZE, layer_pattern=["hybrid"], global_layers=[0, 3], kv_groups=[[1, 2]], window_size=5,
    num_meta_tokens=3, mamba_state_dim=4, make_vocab_size_divisible_by=16,
)  # fmt: skip
STACKS = {
    "hybrid": {},
    "attention": dict(layer_pattern=["attention"]),
    "ssm": dict(layer_pattern=["ssm"], global_layers=[], kv_groups=[]),
    "no_meta_tokens": dict(num_meta_tokens=0),
    "sequential": dict(layer_pattern=["ssm:no_ffn", "attention"], global_layers=[], kv_groups=[[1, 3]]),
    "mamba2": dict(
        layer_pattern=["mamba2:no_ffn", "hybrid"],
        global_layers=[],
        kv_groups=[[1, 3]],
        mamba2_head_dim=16,
        mamba2_state_dim=16,
        branch_fusion="concat",
    ),
}


def config_of(stack: str = "hybrid") -> Config:
    """Small model with window, global layers, shared K/V and meta tokens, in float32 on the CPU."""
    config = Config(model=ModelConfig(**{**MODEL, **STACKS[stack]}))
    config.run.device, config.run.seed = "cpu", 7
    config.precision.params = "float32"
    assert config.data.document_mask, "documents are kept apart unless the user says otherwise"
    return config


def documents(changed: bool = False) -> list[list[np.ndarray]]:
    """Token ids [n] of the documents of each row, each with its end; ``changed``: other ids in one of each row."""
    rng = np.random.default_rng(11)
    rows = [[rng.integers(2, VOCAB_SIZE, n) for n in lengths] for lengths in LENGTHS]
    for row, which in zip(rows, CHANGED, strict=True):
        for document in row:
            document[-1] = EOD
        if changed:
            row[which] = (row[which] - 2 + 7) % (VOCAB_SIZE - 2) + 2
    return rows


def pack(rows: list[list[np.ndarray]]) -> dict[str, torch.Tensor]:
    """Micro-batch [B, S] as the loader makes it of documents that lie end to end."""
    samples = []
    for row in rows:
        borders = np.cumsum([len(document) for document in row])[:-1]
        tokens = np.concatenate(row)
        samples.append({"tokens": tokens[:-1], **mask_documents(tokens, borders)})
    return {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}


def alone(document: np.ndarray) -> dict[str, torch.Tensor]:
    """Micro-batch [1, n - 1] of one document, without any mask: what the packed one must equal."""
    tokens = torch.from_numpy(document)[None]
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}


def of_unchanged(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with labels in the unchanged documents alone."""
    changed = torch.tensor(CHANGED)[:, None]
    return {**batch, "labels": batch["labels"].masked_fill(batch["segment_ids"] == changed, -100)}
