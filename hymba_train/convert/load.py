"""A model to run, from a training checkpoint or a directory in the published format, with our own modelling code.

No file of the directory is executed: ``auto_map`` and Python files in it are ignored.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hymba_train.convert.hf_config import TokenIds
from hymba_train.convert.names import EMBEDDING
from hymba_train.convert.published import CONFIG, PublishedWeights, read_config, read_json
from hymba_train.convert.source import CheckpointWeights, TrainingCheckpoint, parse_dtype
from hymba_train.convert.tokenizer_files import VOCABULARY, token_ids, write_tokenizer_files
from hymba_train.data.tokenizer import Tokenizer
from hymba_train.errors import UserError


@dataclass
class LoadedModel:
    """A model in evaluation mode.

    Attributes:
        model: HymbaForCausalLM.
        tokenizer: None if the source has none.
        tokenizer_source: directory or file that it came from.
        token_ids: ids of special tokens.
        adds_bos: whether a text begins with the bos token, as tokenizer_config.json has it.
        checkpoint: the training checkpoint; None for a directory in the published format.
    """

    model: Any
    tokenizer: Tokenizer | None
    tokenizer_source: Path | None
    token_ids: TokenIds
    adds_bos: bool
    checkpoint: TrainingCheckpoint | None

    def require_tokenizer(self) -> Tokenizer:
        """Raises UserError where there is none."""
        if self.tokenizer is None:
            raise UserError("this model came without a tokenizer; give one with --tokenizer")
        return self.tokenizer

    def transformers_tokenizer(self) -> Any:
        """The tokenizer as transformers has it, for tools that want that."""
        from transformers import AutoTokenizer

        self.require_tokenizer()
        assert self.tokenizer_source is not None
        with tempfile.TemporaryDirectory() as directory:
            write_tokenizer_files(self.tokenizer_source, Path(directory))
            return AutoTokenizer.from_pretrained(directory)


def require_transformers() -> None:
    """Raises UserError where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError("transformers is not installed: pip install 'hymba-train[hf]'")


def load_model(
    path: Path, *, dtype: str | None = None, device: str = "cpu", tokenizer: Path | None = None
) -> LoadedModel:
    """Load a run, a step directory or an exported directory.

    Args:
        dtype: bfloat16 or float32. None: what the run trains in, or the weights' own type.
        tokenizer: use this one instead of the source's own.

    Raises UserError for whatever :func:`export_hf` and :func:`import_hf` refuse, and without transformers.
    """
    require_transformers()
    if (path / CONFIG).is_file():
        checkpoint, source = None, path if any((path / name).is_file() for name in VOCABULARY) else None
        raw, model_config = read_config(path)
        with PublishedWeights(path, model_config) as weights:
            native = "bfloat16" if weights.dtype(EMBEDDING) is torch.bfloat16 else "float32"
            model = _filled(raw, weights.read, parse_dtype(dtype or native), device)
    else:
        checkpoint = TrainingCheckpoint.find(path)
        source = checkpoint.tokenizer_path()
        raw = checkpoint.hf_config("float32", checkpoint.token_ids(None))
        model = _filled(raw, CheckpointWeights(checkpoint).read, parse_dtype(dtype or checkpoint.dtype), device)
    source = tokenizer or source
    text = Tokenizer.load(source) if source is not None else None
    ids = TokenIds.of(raw)
    if text is not None and checkpoint is not None:
        ids = checkpoint.token_ids(token_ids(text))
    return LoadedModel(model, text, source, ids, _adds_bos(source), checkpoint)


def new_model(config_json: Mapping[str, Any], dtype: torch.dtype, device: str) -> Any:
    """HymbaForCausalLM of a config.json, with the weights that it begins with (none on the device "meta")."""
    from hymba_train.hf.configuration_hymba import HymbaConfig
    from hymba_train.hf.modeling_hymba import FLOAT32_MODULES, HymbaForCausalLM

    other = ("auto_map", "torch_dtype", "dtype", "transformers_version")
    with torch.device(device):
        model = HymbaForCausalLM(HymbaConfig(**{k: v for k, v in config_json.items() if k not in other})).to(dtype)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in FLOAT32_MODULES:
            module.float()
    return model.eval().requires_grad_(False)


def _filled(config_json: Mapping[str, Any], read: Callable[[str], Tensor], dtype: torch.dtype, device: str) -> Any:
    """:func:`new_model` with tensors from ``read`` (published name -> tensor), one held at a time beside the model."""
    model = new_model(config_json, dtype, "meta").to_empty(device=device)
    model.tie_weights()
    for name, parameter in model.named_parameters():  # a tied head is not among them twice
        parameter.copy_(read(name))
    return model


def _adds_bos(source: Path | None) -> bool:
    path = source / "tokenizer_config.json" if source is not None and source.is_dir() else None
    return bool(path is not None and path.is_file() and read_json(path).get("add_bos_token", False))
