"""RoPE, RMSNorm and the document helpers."""

import dataclasses

import pytest
import torch

from hymba_train.config.schema import ModelConfig
from hymba_train.describe.dims import effective_rotary_base
from hymba_train.ops import apply_rope, rms_norm, rope_tables
from hymba_train.ops.segments import document_offsets, document_starts

HYMBA = ModelConfig(
    name="1.5b", hidden_size=1600, num_attention_heads=25, rope_type="ntk", max_position_embeddings=8192,
    rope_original_max_positions=2048,
)  # fmt: skip


def test_effective_base_and_frequencies_of_the_published_model():
    base = effective_rotary_base(HYMBA)
    assert base == pytest.approx(74534.83, abs=5e-3)
    assert effective_rotary_base(HYMBA, "default") == 10000.0
    assert effective_rotary_base(dataclasses.replace(HYMBA, rope_type="default"), "ntk") == base
    cos, sin = rope_tables(torch.tensor([1]), 64, base)
    angles = torch.atan2(sin, cos)[0]
    expected = torch.tensor([1.0, 0.704269, 0.495995, 0.349314])
    torch.testing.assert_close(angles[:4], expected, rtol=0, atol=1e-6)
    assert angles[-1].item() == pytest.approx(1.905031e-5, rel=1e-5)


def test_tables_are_float32_and_exact_far_out():
    positions = torch.arange(8320).view(2, 4160)
    cos, sin = rope_tables(positions, 64, 74534.83)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (2, 4160, 32)
    frequency = 74534.83 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    exact = (positions.double()[..., None] * frequency).cos()
    assert (cos - exact).abs().max() < 2e-3  # float32 angles up to 8319: half a unit in the last place is 5e-4


def test_halves_are_rotated_not_pairs():
    x = torch.zeros(1, 1, 1, 8)
    x[..., 1] = 1.0
    cos, sin = rope_tables(torch.tensor([[3]]), 8, 100.0)
    out = apply_rope(x, cos, sin)[0, 0, 0]
    angle = torch.tensor(3 * 100.0 ** (-2 / 8))
    expected = torch.zeros(8)
    expected[1], expected[5] = angle.cos(), angle.sin()
    torch.testing.assert_close(out, expected)


def test_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 16).double(), torch.randn(1, 2, 16).double()

    def score(i, j):
        rotated = [
            apply_rope(x, *(t.double() for t in rope_tables(torch.tensor([p]), 16, 50.0))) for x, p in ((q, i), (k, j))
        ]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-4, atol=1e-4)
    assert (score(9, 4) - score(9, 5)).abs() > 1e-2


def test_rotation_is_in_the_dtype_of_x():
    x = torch.randn(2, 3, 4, 8).bfloat16()
    cos, sin = rope_tables(torch.arange(3).expand(2, 3), 8, 100.0)
    out = apply_rope(x, cos, sin)
    assert out.dtype == torch.bfloat16
    first, second = x.chunk(2, -1)
    c, s = cos.bfloat16()[:, :, None], sin.bfloat16()[:, :, None]
    assert torch.equal(out, torch.cat((first * c - second * s, second * c + first * s), -1))


def test_rms_norm_casts_back_before_the_weight():
    torch.manual_seed(0)
    x, weight = torch.randn(64, 32).bfloat16() * 3, torch.randn(32)
    wide = x.double()
    normalised = (wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()).float().bfloat16()
    found = rms_norm(x, weight, 1e-6)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, normalised * weight.bfloat16())
    weight_first = ((wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()) * weight).bfloat16()
    assert not torch.equal(found, weight_first)


@pytest.mark.parametrize("eps", [1e-6, 1e-1])
def test_rms_norm_eps_is_inside_the_root(eps):
    x = torch.tensor([[1e-3, -2e-3, 1e-3]], dtype=torch.float64)
    found = rms_norm(x, torch.tensor([1.0, 2.0, 3.0]), eps)
    assert found.dtype == torch.float64
    expected = x / (2e-6 + eps) ** 0.5 * torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(found, expected)


def test_document_helpers():
    ids = torch.tensor([[0, 0, 2, 2, 2, 7], [4, 5, 5, 5, 6, 7]])
    assert document_starts(ids).int().tolist() == [[1, 0, 1, 0, 0, 1], [1, 1, 0, 0, 1, 1]]
    assert document_offsets(ids).tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 0, 0]]
