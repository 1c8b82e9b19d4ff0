"""Golden data: numbers that NVIDIA's published code gave on small configurations (float32, CPU).

Cases lie in tests/golden/, the rest in ../shared/golden/hymba beside the repository (or $HYMBA_SHARED/golden/hymba)::

    @pytest.mark.parametrize("name", golden_data.cases())
    def test_x(name):
        case = golden_data.load(name)
        ... case.config, case.weights, case.tensors, case.tolerance ...
        case.check_gradients({name: parameter.grad ...})
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hymba_train.config.schema import ModelConfig
from hymba_train.convert.hf_config import model_config_from_hf
from tests.hf_names import from_hf_state_dict, to_hf_state_dict

NAMES = ("a_pair_triple_ntk", "b_untied_default_rope", "c_mqa_padded")
ROOT = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("HYMBA_SHARED", ROOT.parent.parent / "shared"))


@dataclass(frozen=True)
class GoldenCase:
    """``weights`` are by our names, ``hf_weights``, ``tensors`` by the published ones; ``info`` is golden.json."""

    name: str
    config: ModelConfig
    config_json: dict[str, Any]
    weights: dict[str, Tensor]
    hf_weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    info: dict[str, Any]

    @property
    def tolerance(self) -> dict[str, Any]:
        return self.info["tolerance"]

    @property
    def pad_id(self) -> int:
        return self.config_json["pad_token_id"]

    def gradients(self, prefix: str = "grad.") -> dict[str, Tensor]:
        """Golden gradients by published name (prefix 'padded.grad.': of the padded batch of case c)."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def check_gradients(self, gradients: Mapping[str, Tensor], prefix: str = "grad.") -> None:
        """Hold gradients (our names, true shapes, every parameter) to the golden ones and, for prefix 'grad.', to the
        norm of every parameter's gradient. The embedding's must be :func:`without_pad_lookup`."""
        found = to_hf_state_dict(self.config, gradients)
        expected = self.gradients(prefix)
        assert expected
        for name, gradient in expected.items():
            error = (found[name] - gradient).abs().max() / gradient.abs().max()
            assert error <= self.tolerance["grad_max_abs_over_max"], f"gradient of {name} is off by {error:.2e} of max"
        if prefix == "grad.":
            norms = self.info["grad_l2_norms"]
            assert set(norms) == set(found)
            for name, norm in norms.items():
                error = abs(found[name].double().norm().item() - norm) / norm
                assert error <= self.tolerance["grad_l2_norm_rel"], f"gradient norm of {name} is off by {error:.2e}"


def without_pad_lookup(gradient: Tensor, tokens: Tensor, d_embeddings: Tensor, pad_id: int) -> Tensor:
    """Gradient of the embedding table [V, D] as padding_idx makes it: less what the pad token's look-ups gave.

    tokens [B, S]; d_embeddings [B, S, D], the gradient to the looked-up rows.
    """
    result = gradient.clone()
    result[pad_id] -= d_embeddings[tokens == pad_id].sum(0)
    return result


def shifted(labels: Tensor) -> Tensor:
    """Labels as the published code takes them [B, S] -> what each token is to predict; -100 after the last."""
    return torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], -100)), dim=1)


def directory(name: str) -> Path:
    inside = ROOT / "golden" / name
    return inside if inside.is_dir() else SHARED / "golden" / "hymba" / name


def cases() -> list[Any]:
    """Arguments for pytest.mark.parametrize: a name each, skipped where its files are not there."""
    return [
        pytest.param(name, id=name, marks=pytest.mark.skipif(
            not (directory(name) / "golden.safetensors").is_file(),
            reason=f"golden case {name} is not in tests/golden nor in {SHARED.name}/golden; set HYMBA_SHARED",
        ))
        for name in NAMES
    ]  # fmt: skip


@functools.cache
def load(name: str) -> GoldenCase:
    """The case ``name``; one object for all callers: change nothing in it."""
    path = directory(name)
    config_json = json.loads((path / "config.json").read_text())
    config = model_config_from_hf(config_json)
    hf_weights = load_file(path / "model.safetensors")
    return GoldenCase(
        name, config, config_json, from_hf_state_dict(config, hf_weights), hf_weights,
        load_file(path / "golden.safetensors"), json.loads((path / "golden.json").read_text()),
    )  # fmt: skip
