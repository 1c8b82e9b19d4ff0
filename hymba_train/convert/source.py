"""What there is to export or to run: a training checkpoint with its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hymba_train.checkpoint.directory import CHECKPOINTS, steps_at
from hymba_train.checkpoint.metadata import origin_of, read_metadata
from hymba_train.config import data_file
from hymba_train.config.schema import TO_BE_GIVEN, Config
from hymba_train.config.typed import from_plain
from hymba_train.convert.dcp import CheckpointReader
from hymba_train.convert.hf_config import TokenIds, hf_config, require_exportable
from hymba_train.convert.names import checkpoint_keys, hf_parts
from hymba_train.convert.shards import PlannedTensor
from hymba_train.describe import model_tensors
from hymba_train.describe.tensors import TensorDescription
from hymba_train.errors import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
EXACT_SUFFIXES = ("mixer.A_log", "mixer.D", "mixer.dt_bias")
"""Tensors that the model uses in float32, so that rounding them changes what it computes."""


def parse_dtype(name: str) -> torch.dtype:
    """Raises UserError for what is no type of an export."""
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: give {' or '.join(DTYPES)}")
    return DTYPES[name]


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A complete step directory. Nothing of Megatron-Core and no process group is needed to read it."""

    path: Path
    metadata: dict[str, Any]
    config: Config

    @classmethod
    def find(cls, path: Path) -> TrainingCheckpoint:
        """``path`` is a step directory, or a run, whose newest complete checkpoint is taken. Raises UserError."""
        steps = steps_at(path)
        if not steps:
            raise UserError(
                f"{path}: neither a complete step directory (step_0001000) nor a run directory with one; "
                "hymba train writes them into runs/NAME/checkpoints"
            )
        step = steps[0]
        metadata = read_metadata(step)
        try:
            config = from_plain(metadata["config"])
        except UserError as error:
            raise UserError(*(f"{step}/checkpoint.json: {problem}" for problem in error.problems)) from error
        return cls(step, metadata, config)

    @property
    def run_directory(self) -> Path:
        return self.path.parent.parent if self.path.parent.name == CHECKPOINTS else self.path.parent

    @property
    def phase(self) -> Any:
        """The phase that was trained last (PhaseConfig), or None for an imported model."""
        phases = list(self.config.data.phases.values())
        return phases[self.metadata["train_state"]["phase"]] if phases else None

    @property
    def rope_type(self) -> str:
        return (self.phase and self.phase.rope_type) or self.config.model.rope_type

    @property
    def dtype(self) -> str:
        """What the run trains in, as :data:`DTYPES` names it."""
        return "bfloat16" if self.config.precision.params == "bf16" else "float32"

    @property
    def is_imported(self) -> bool:
        """Whether from-hf wrote it: weights in the published format, not trained since."""
        return "imported" in self.metadata

    def token_ids(self, of_tokenizer: TokenIds | None) -> TokenIds:
        """Those of the config.json that was imported; else ``of_tokenizer``, or without one the published model's."""
        if self.is_imported:
            return TokenIds(**self.metadata["imported"]["token_ids"])
        return of_tokenizer or TokenIds()

    @property
    def origin(self) -> dict[str, Any] | None:
        """:func:`hymba_train.checkpoint.metadata.origin_of` these weights."""
        return origin_of(self.metadata)

    def tokenizer_path(self) -> Path | None:
        """Directory or file of the tokenizer, if the run has one and it is still there."""
        inside = self.run_directory / "tokenizer"
        if inside.is_dir():
            return inside
        given = self.config.data.tokenizer
        path = None if given == TO_BE_GIVEN else data_file(self.config.data, given)
        return path if path is not None and path.exists() else None

    def hf_config(self, dtype: str, token_ids: TokenIds) -> dict[str, Any]:
        return hf_config(self.config.model, dtype, token_ids, self.rope_type)


class CheckpointWeights:
    """Tensors of a training checkpoint under their published names, read one at a time.

    Raises UserError with a line for each that is missing or has another shape than the configuration asks for.
    """

    def __init__(self, checkpoint: TrainingCheckpoint) -> None:
        require_exportable(checkpoint.config.model)
        self.reader = CheckpointReader(checkpoint.path)
        self.descriptions = model_tensors(checkpoint.config.model)
        self._parts: dict[str, tuple[TensorDescription, int]] = {}
        problems = []
        for description in self.descriptions:
            for number, (name, _) in enumerate(hf_parts(description)):
                self._parts[name] = (description, number)
            for key, shape in checkpoint_keys(description):
                if self.reader.shape(key) != shape:
                    found = self.reader.shape(key)
                    state = "is missing" if found is None else f"has shape {list(found)}"
                    problems.append(f"{checkpoint.path}: {key} {state}; the configuration asks for {list(shape)}")
        if problems:
            raise UserError(*problems[:10])

    def read(self, name: str) -> Tensor:
        """One tensor by its published name and in its published shape, in the checkpoint's type."""
        description, number = self._parts[name]
        _, shape = hf_parts(description)[number]
        keys = [key for key, _ in checkpoint_keys(description)]
        if len(hf_parts(description)) > 1:  # published in as many tensors as the checkpoint has: gate and up
            keys = keys[number : number + 1]
        tensors = [self.reader.read(key) for key in keys]
        return (tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=description.cut_axis)).reshape(shape)

    def plan(self, dtype: torch.dtype) -> list[PlannedTensor]:
        """Every tensor of an export of type ``dtype``, in forward order.

        In a bfloat16 export A_log, D and the dt bias stay float32 wherever rounding would change them.
        """
        planned = []
        for description in self.descriptions:
            for name, shape in hf_parts(description):
                exact = description.name.endswith(EXACT_SUFFIXES) and not _survives(self.read(name), dtype)
                planned.append(PlannedTensor(name, shape, torch.float32 if exact else dtype))
        return planned


def _survives(tensor: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)
