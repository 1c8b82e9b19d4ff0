"""A model to run, from a training checkpoint or a directory in the published format, with our own modelling code.

No file of the directory is executed: ``auto_map`` and Python files in it are ignored.
"""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hymba_train.convert.hf_config import TokenIds
from hymba_train.convert.published import CONFIG, PublishedWeights, read_config, read_json
from hymba_train.convert.source import DTYPES, HubWeights, TrainingCheckpoint
from hymba_train.convert.tokenizer_files import token_ids, write_tokenizer_files
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
        raw, model_config = read_config(path)
        with PublishedWeights(path, model_config) as weights:
            native = "bfloat16" if weights.dtype("model.embed_tokens.weight") is torch.bfloat16 else "float32"
            model = _build(raw, weights.read, _dtype(dtype or native), device)
        checkpoint, source = None, path if _has_tokenizer(path) else None
    else:
        checkpoint = TrainingCheckpoint.find(path)
        native = "bfloat16" if checkpoint.config.precision.params == "bf16" else "float32"
        hub = HubWeights(checkpoint)
        raw = checkpoint.hf_config("float32", TokenIds(**checkpoint.imported.get("token_ids", {})))
        model = _build(raw, hub.read, _dtype(dtype or native), device)
        source = checkpoint.tokenizer_path()
    source = tokenizer or source
    text = Tokenizer.load(source) if source is not None else None
    ids = TokenIds.of(raw)
    if text is not None and checkpoint is not None and not checkpoint.imported:
        ids = token_ids(text)
    return LoadedModel(model, text, source, ids, _adds_bos(source), checkpoint)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: give {' or '.join(DTYPES)}")
    return DTYPES[name]


def _build(raw: dict[str, Any], read: Any, dtype: torch.dtype, device: str) -> Any:
    """HymbaForCausalLM with tensors from ``read`` (published name -> tensor), one held at a time beside the model."""
    from hymba_train.hf.configuration_hymba import HymbaConfig
    from hymba_train.hf.modeling_hymba import FLOAT32_MODULES, HymbaForCausalLM

    known = {k: v for k, v in raw.items() if k not in ("auto_map", "torch_dtype", "dtype", "transformers_version")}
    with torch.device("meta"):
        model = HymbaForCausalLM(HymbaConfig(**known)).to(dtype)
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in FLOAT32_MODULES:
                module.float()
    model = model.to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a tied head is not among them twice
            parameter.copy_(read(name))
    return model.eval().requires_grad_(False)


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _adds_bos(source: Path | None) -> bool:
    path = source / "tokenizer_config.json" if source is not None and source.is_dir() else None
    return bool(path is not None and path.is_file() and read_json(path).get("add_bos_token", False))
