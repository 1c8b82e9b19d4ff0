"""Reading a directory in the published format: config.json and safetensors, nothing that can run code.

Whatever the directory holds beside them (Python files, ``auto_map``, pickles) is never opened.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hymba_train.config.schema import ModelConfig
from hymba_train.config.typed import from_plain, to_plain
from hymba_train.convert.hf_config import model_config_from_hf
from hymba_train.convert.names import EMBEDDING, HEAD, checkpoint_entries, hf_parts
from hymba_train.describe import model_tensors, resolve_stack
from hymba_train.errors import UserError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MAX_JSON_BYTES, _MAX_LAYERS, _MAX_SIZE = 64 * 2**20, 4096, 2**31


def read_config(directory: Path) -> tuple[dict[str, Any], ModelConfig]:
    """config.json as it stands, and as a ModelConfig. Raises UserError for anything we do not have."""
    raw = read_json(directory / CONFIG)
    if raw.get("model_type") != "hymba":
        raise UserError(f"{directory / CONFIG}: model_type is {raw.get('model_type')!r}, not 'hymba'")
    for key, value in raw.items():
        limit = _MAX_LAYERS if key == "num_hidden_layers" else _MAX_SIZE
        if isinstance(value, int) and not -1 <= value < limit:
            raise UserError(f"{directory / CONFIG}: {key} = {value} cannot be")
        if key in _TOKEN_IDS and value is not None and type(value) is not int:
            raise UserError(f"{directory / CONFIG}: {key} = {value!r} cannot be; one number is expected")
    try:
        model = model_config_from_hf(raw)
        model = from_plain({"model": to_plain(model)}).model  # checks the types
        resolve_stack(model)
        sizes = (model.num_layers, model.hidden_size, model.num_attention_heads, model.num_query_groups)
        if min(*sizes, model.vocab_size, model.ffn_hidden_size, model.mamba_expand, model.mamba_state_dim) < 1:
            raise ValueError("a size is not positive")
        model_tensors(model)
    except UserError as error:
        lines = (problem.removeprefix("config.json: ") for problem in error.problems)
        raise UserError(*(f"{directory / CONFIG}: {line}" for line in lines)) from error
    except (TypeError, ValueError, KeyError, IndexError, ArithmeticError, StopIteration) as error:
        raise UserError(f"{directory / CONFIG}: not a Hymba configuration ({type(error).__name__}: {error})") from error
    return raw, model


class PublishedWeights:
    """Tensors of a directory, opened and checked as a whole, read one at a time.

    Every name, shape and type is held to the configuration first. Raises UserError with a line for each that is
    missing, unknown, or otherwise; for a damaged file; for an index that names a file elsewhere; for pickles.
    """

    def __init__(self, directory: Path, model: ModelConfig) -> None:
        self.directory = directory
        self._files = contextlib.ExitStack()
        self._paths: dict[str, Path] = {}
        try:
            self._where = self._open()
            self._check(model)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PublishedWeights:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self._files.close()

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the file's type."""
        from safetensors import safe_open

        # Opened anew and copied: an open file keeps every page that was ever read in this process's memory.
        with safe_open(self._paths[name], framework="pt") as file:
            return file.get_tensor(name).clone()

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._where[name].get_slice(name).get_dtype()]

    def _open(self) -> dict[str, Any]:
        mapped = self._index()
        where: dict[str, Any] = {}
        for file in sorted(set(mapped.values())) if mapped is not None else [SINGLE]:
            opened = self._open_file(self.directory / file)
            for name in list(opened.keys()):
                if mapped is not None and mapped.get(name) != file:
                    index, said = self.directory / INDEX, mapped.get(name)
                    raise UserError(f"{index}: {name} lies in {file}, the index says {said}")
                where[name], self._paths[name] = opened, self.directory / file
        for name, file in sorted((mapped or {}).items()):
            if name not in where:
                raise UserError(f"{self.directory / INDEX}: {name} is not in {file}")
        return where

    def _index(self) -> dict[str, str] | None:
        """Tensor -> file by the index; None if there is one file and no index."""
        path = self.directory / INDEX
        if not path.is_file():
            if (self.directory / SINGLE).is_file():
                return None
            pickles = [p.name for pattern in _PICKLES for p in sorted(self.directory.glob(pattern))]
            advice = f"; {pickles[0]} is not read, as loading it can run code: convert it first" if pickles else ""
            raise UserError(f"{self.directory}: there is neither {SINGLE} nor {INDEX}{advice}")
        mapped = read_json(path).get("weight_map")
        if not isinstance(mapped, dict) or not mapped:
            raise UserError(f"{path}: there is no weight_map")
        for name, file in mapped.items():
            plain = isinstance(file, str) and Path(file).name == file and "\\" not in file
            if not plain or not file.endswith(".safetensors"):
                raise UserError(f"{path}: {name} lies in {file!r}, which is no .safetensors file of this directory")
        return mapped

    def _open_file(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise UserError(f"{path}: no such file, but {INDEX} names it")
        try:
            return self._files.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged or no safetensors file ({error}); fetch it again") from error

    def _check(self, model: ModelConfig) -> None:
        expected = {name: shape for t in model_tensors(model) for name, shape in hf_parts(t)}
        problems = []
        for name, shape in expected.items():
            if name not in self._where:
                problems.append(f"{name}: missing; the configuration asks for it with shape {list(shape)}")
                continue
            found = self._where[name].get_slice(name)
            if tuple(found.get_shape()) != shape:
                problems.append(f"{name}: has shape {found.get_shape()}, the configuration asks for {list(shape)}")
            elif found.get_dtype() not in DTYPES:
                problems.append(f"{name}: is {found.get_dtype()}; only {', '.join(DTYPES)} are read")
        tied_head = HEAD in self._where and HEAD not in expected
        if tied_head and not problems and not torch.equal(self.read(HEAD), self.read(EMBEDDING)):
            problems.append(f"{HEAD}: differs from {EMBEDDING}, but tie_word_embeddings is true")
        allowed = set(expected) | ({HEAD} if tied_head else set())
        problems += [f"{name}: no such tensor in this configuration" for name in sorted(set(self._where) - allowed)]
        if problems:
            more = [f"and {len(problems) - 10} tensors more"] if len(problems) > 10 else []
            raise UserError(*(f"{self.directory}: {line}" for line in problems[:10] + more))


def iterate_tensors(model: ModelConfig, weights: PublishedWeights) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of every entry that a training checkpoint of ``model`` has, in forward order."""
    for description in model_tensors(model):
        tensors = [weights.read(name) for name, _ in hf_parts(description)]
        full = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        yield from checkpoint_entries(description, full.reshape(description.shape))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a directory from elsewhere. Raises UserError: missing, too large, or something else."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise UserError(f"{path}: larger than any such file")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; a directory in Hugging Face format is expected") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content
