"""A training run small enough for a test: synthetic sources, a Hymba of 4 layers, two phases.

As a script it is one process of one run or of several, one after the other (a start costs more than a run)::

    python -m tests.train.tiny_run DIRECTORY key=value ... [then key=value ...]

A run that ends in a UserError prints it and the next one starts.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from hymba_train.config import Config, from_plain
from hymba_train.plan.steps import plan_steps
from tests.device import SETTINGS

VOCAB = 96


def write_data(directory: Path) -> None:
    """Tokenizer and two sources with something to learn, in ``directory``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    from hymba_train.data.indexed_writer import IndexedWriter

    directory.mkdir(parents=True, exist_ok=True)
    words = {"</s>": 0, **{f"w{i}": i for i in range(1, VOCAB)}}
    Tokenizer(WordLevel(words, unk_token="</s>")).save(str(directory / "tokenizer.json"))
    for number, name in enumerate(("odd", "even")):
        rng = np.random.default_rng(number)
        with IndexedWriter(directory / name, np.uint16) as writer:
            for _ in range(60):
                document = rng.integers(1, VOCAB, size=97).astype(np.uint16)
                document[number + 1 :: 2] = document[number:-1:2]
                document[-1] = 0
                writer.add_documents(document, np.array([97]))
            writer.publish()


def tiny_config(directory: Path, **changes) -> Config:
    """Configuration with its data and runs in ``directory``; ``changes`` as {"optim.lr": 0.01}."""
    plain = {
        "model": {
            "name": "tiny", "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
            "num_query_groups": 2, "vocab_size": VOCAB, "global_layers": [0, 3], "kv_groups": [[1, 2]],
            "window_size": 8, "num_meta_tokens": 4, "mamba_state_dim": 4, "mamba_dt_rank": 4,
            "make_vocab_size_divisible_by": 16, "rope_type": "default",
        },
        "precision": {"params": "float32"},
        "optim": {"lr": 0.01, "min_lr": 0.001},
        "schedule": {"lr_warmup_fraction": 0.1},
        "data": {
            "path": str(directory), "tokenizer": "tokenizer.json", "validation_sequences": 5,
            "sources": {n: {"path": n, "validation_fraction": 0.1} for n in ("odd", "even")},
            "phases": {
                "short": {
                    "tokens": 512, "seq_length": 16, "global_batch_size": 8, "micro_batch_size": 2,
                    "blend": {"odd": 0.7, "even": 0.3},
                },
                "long": {
                    "tokens": 768, "seq_length": 32, "global_batch_size": 4, "micro_batch_size": 1, "rope_type": "ntk",
                    "blend": {"odd": 0.2, "even": 0.8},
                },
            },
        },
        "checkpoint": {"save_interval": 0, "async_save": False},
        "logging": {"log_interval": 1, "eval_interval": 5, "tensorboard": False, "batch_hash": True},
        "run": {"name": "tiny", "directory": str(directory / "runs"), "device": "cpu"},
    }  # fmt: skip
    for key, value in {**SETTINGS, **changes}.items():
        *groups, last = key.split(".")
        node = plain
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return from_plain(plain)


def tiny_plan(config: Config) -> SimpleNamespace:
    """What ``train`` reads of a Plan: equal chunks, and the steps."""
    num_chunks = config.parallel.pipeline * config.parallel.virtual_pipeline
    per_chunk = config.model.num_layers // num_chunks
    chunks = [SimpleNamespace(layers=range(i * per_chunk, (i + 1) * per_chunk)) for i in range(num_chunks)]
    return SimpleNamespace(chunks=chunks, steps=plan_steps(config.data.phases))


def main() -> int:
    import json
    import logging

    import torch

    from hymba_train.errors import UserError
    from hymba_train.parallel import destroy_groups, shutdown
    from hymba_train.train import main as training

    training.shutdown = destroy_groups  # the default process group serves all runs of this process
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    for arguments in " ".join(sys.argv[2:]).split(" then "):
        pairs = (argument.split("=", 1) for argument in arguments.split())
        config = tiny_config(Path(sys.argv[1]), **{key: json.loads(value) for key, value in pairs})
        try:
            training.train(config, tiny_plan(config))
        except UserError as error:
            print(f"UserError: {error}", flush=True)
            destroy_groups()
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
