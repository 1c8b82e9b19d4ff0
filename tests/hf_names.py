"""Whole models under our names and under the published ones, in memory. ``hymba convert`` goes tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hymba_train.config.schema import ModelConfig
from hymba_train.convert.names import hf_parts
from hymba_train.describe.tensors import model_tensors


def from_hf_state_dict(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published names -> ours, true shapes; every tensor is used, except a tied lm_head.weight."""
    left = dict(tensors)
    found = {
        t.name: torch.cat([left.pop(name) for name, _ in hf_parts(t)]).reshape(t.shape) for t in model_tensors(config)
    }
    assert set(left) <= {"lm_head.weight"}, left.keys()
    return found


def to_hf_state_dict(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours (true shapes) -> published names."""
    result = {}
    for description in model_tensors(config):
        names, shapes = zip(*hf_parts(description), strict=True)
        rows = tensors[description.name].split([shape[0] for shape in shapes])
        result |= {n: r.reshape(s).contiguous() for n, s, r in zip(names, shapes, rows, strict=True)}
    return result
