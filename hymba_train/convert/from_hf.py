"""``hymba convert from-hf``: weights in the published format as a checkpoint that any layout trains on."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from hymba_train.checkpoint import manifest
from hymba_train.checkpoint.directory import CHECKPOINTS, LATEST, step_name
from hymba_train.checkpoint.metadata import Layout, metadata_of, write_metadata
from hymba_train.config.schema import Config, ModelConfig
from hymba_train.config.typed import to_plain
from hymba_train.convert.dcp import CheckpointWriter
from hymba_train.convert.hf_config import TokenIds
from hymba_train.convert.names import EMBEDDING
from hymba_train.convert.published import PublishedWeights, iterate_tensors, read_config
from hymba_train.convert.to_hf import new_directory
from hymba_train.convert.tokenizer_files import copy_tokenizer
from hymba_train.describe import model_tensors

RECIPE = Path("recipes", "model", "imported.yaml")


def import_hf(model_directory: Path, output: Path) -> Path:
    """Write ``output``: a run directory with the weights as step 0, without optimizer state. Returns it.

    ``output/recipes/model/imported.yaml`` describes the model. Train from it under any layout with::

        hymba train --config-dir OUTPUT/recipes model=imported \\
            checkpoint.load=OUTPUT checkpoint.load_optimizer=false ...

    Nothing in ``model_directory`` is executed. Raises UserError for whatever does not fit; ``output`` is then not made.
    """
    raw, model = read_config(model_directory)
    config = Config(model=model)
    config.run.name = output.name
    with PublishedWeights(model_directory, model) as weights, new_directory(output) as directory:
        config.precision.params = "float32" if weights.dtype(EMBEDDING) is torch.float32 else "bf16"
        step = directory / CHECKPOINTS / step_name(0)
        step.mkdir(parents=True)
        float32 = {t.name for t in model_tensors(model) if t.float32}
        with CheckpointWriter(step) as writer:
            for key, tensor in iterate_tensors(model, weights):
                writer.write(key, tensor.float() if key in float32 or tensor.dtype is torch.float16 else tensor)
        copy_tokenizer(model_directory, directory / "tokenizer")
        source = _plain(str(raw.get("_name_or_path") or model_directory.resolve().name))
        imported = {
            "source": source,
            "license": _license(model_directory),
            "token_ids": vars(TokenIds.of(raw)),
        }
        state = dict.fromkeys(("step", "phase", "samples_in_phase", "samples", "tokens"), 0)
        metadata = metadata_of(config, Layout(1, 1, 1, 1, 1, "cpu"), state)
        write_metadata(step, metadata | {"weights_only": True, "imported": imported})
        manifest.write(step, manifest.make(step))
        (directory / CHECKPOINTS / LATEST).write_text(step.name + "\n")
        _write_recipe(directory / RECIPE, model, source)
    return output


def _plain(text: str) -> str:
    """A name from a foreign file, fit for a model card and a comment."""
    return re.sub(r"[^\w./+-]", "_", text)[:100]


def _license(directory: Path) -> str | None:
    """The licence field of the model card's header, if it has one of a plain form."""
    card = directory / "README.md"
    if not card.is_file():
        return None
    header = card.read_text(encoding="utf-8", errors="replace")[:4096].partition("\n---")[0]
    name = re.search(r"^license_name:\s*([\w.+-]+)\s*$", header, re.MULTILINE)
    found = name or re.search(r"^license:\s*([\w.+-]+)\s*$", header, re.MULTILINE)
    return found[1] if found else None


def _write_recipe(path: Path, model: ModelConfig, source: str) -> None:
    import yaml

    path.parent.mkdir(parents=True)
    body = yaml.safe_dump(to_plain(model), sort_keys=False, default_flow_style=None, allow_unicode=True)
    path.write_text(f"# Model of {source}, by hymba convert from-hf\n{body}", encoding="utf-8")
