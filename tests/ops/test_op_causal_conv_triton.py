"""The Triton convolution against the plain-torch one (held to its formula in test_op_causal_conv), in float64."""

import pytest
import torch

from hymba_train.errors import UserError
from hymba_train.ops.causal_conv import causal_conv_rows
from hymba_train.ops.gradient_slots import split_columns
from hymba_train.ops.segments import rows_reach
from tests.ops.fused import DEVICE, DTYPES, assert_close, check, needs_triton, outputs_and_gradients, random

pytestmark = needs_triton
PACKED = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 5, 5, 5, 6, 7, 7, 7, 7], [3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4]])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    from hymba_train.ops import causal_conv_triton

    monkeypatch.setattr(causal_conv_triton, "FORWARD_CHUNK", 8)
    monkeypatch.setattr(causal_conv_triton, "BACKWARD_CHUNK", 8)
    monkeypatch.setattr(causal_conv_triton, "FINISH_LINES", 2)


def functions(num_meta, ids, split=False, batch=2, seq=15):
    """(fused, plain) of x [N, 12], whose columns 3..7 are convolved, weight and bias."""
    from hymba_train.ops.causal_conv_triton import causal_conv_rows_triton

    sizes = dict(num_meta=num_meta, batch=batch, seq=seq)

    def fused(x, weight, bias):
        x = split_columns(x, [3, 5, 4])[1] if split else x[:, 3:8]
        return causal_conv_rows_triton(x, weight, bias, segment_ids=None if ids is None else ids.to(DEVICE), **sizes)

    return fused, lambda x, w, b: causal_conv_rows(x[:, 3:8], w, b, segment_ids=ids, **sizes)


def inputs(num_meta, batch=2, seq=15, padding=2):
    """Rows of padding are zero, as they are in a model."""
    x = random(num_meta + batch * seq + padding, 12)
    x[num_meta + batch * seq :] = 0
    return [x, random(5, 4), random(5)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_meta", [0, 1, 2, 9])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_plain(dtype, num_meta, packed):
    """From a slice of wider rows, with two rows of padding behind the text."""
    check(*functions(num_meta, PACKED if packed else None), inputs(num_meta), dtype)


def test_gradient_goes_into_its_slot():
    check(*functions(9, PACKED, split=True), inputs(9), torch.bfloat16)


@pytest.mark.parametrize("seq", [1, 3, 4, 5, 7, 8, 9, 11])
def test_lengths_around_chunk_borders(seq):
    check(*functions(0, None, batch=1, seq=seq), inputs(0, 1, seq, 0), torch.float32)


@pytest.mark.parametrize("seed", range(4))
def test_documents_anywhere(seed):
    """Starts at random places, next to one another and to chunk borders."""
    generator = torch.Generator().manual_seed(seed)
    seq, num_meta = (int(torch.randint(1, high, (), generator=generator)) for high in (30, 7))
    ids = torch.cumsum((torch.rand(2, seq, generator=generator) < 0.3).long(), 1)
    check(*functions(num_meta, ids, seq=seq), inputs(num_meta, seq=seq), torch.float32)


def test_no_rows():
    """No output, and zeros as gradients of the weights."""
    function, _ = functions(0, None, batch=1, seq=0)
    leaves = [t.float().to(DEVICE).requires_grad_() for t in inputs(0, 1, 0, 0)]
    gradients = torch.autograd.grad(function(*leaves).sum(), leaves)
    assert [g.shape for g in gradients] == [t.shape for t in leaves]
    assert not any(g.any() for g in gradients)


def test_more_channels_than_one_program(monkeypatch):
    from hymba_train.ops import causal_conv_triton as module

    for name, channels in (("FORWARD_CHANNELS", 32), ("BACKWARD_CHANNELS", 16), ("FINISH_CHANNELS", 8)):
        monkeypatch.setattr(module, name, channels)
    sizes = dict(num_meta=3, batch=2, seq=15)
    check(
        lambda *t: module.causal_conv_rows_triton(*t, segment_ids=PACKED.to(DEVICE), **sizes),
        lambda *t: causal_conv_rows(*t, segment_ids=PACKED, **sizes), [random(33, 33), random(33, 4), random(33)],
        torch.float32,
    )  # fmt: skip


def test_reach_may_be_given():
    from hymba_train.ops.causal_conv_triton import causal_conv_rows_triton

    reach = rows_reach(9, 2, 15, 41, PACKED, 3, torch.device("cpu")).to(DEVICE)

    def fused(x, weight, bias):
        return causal_conv_rows_triton(x[:, 3:8], weight, bias, num_meta=9, batch=2, seq=15, reach=reach)

    check(fused, functions(9, PACKED)[1], inputs(9), torch.float32)


def test_other_widths_are_refused():
    from hymba_train.ops.causal_conv_triton import causal_conv_rows_triton

    with pytest.raises(UserError, match=r"needs mamba_conv_width=4, not 3; use 'torch'"):
        causal_conv_rows_triton(torch.zeros(2, 3), torch.zeros(3, 3), torch.zeros(3), num_meta=0, batch=1, seq=2)


def test_weight_gradients_have_the_same_bits_every_time():
    function, _ = functions(9, PACKED)
    runs = [outputs_and_gradients(function, inputs(9), torch.float32, DEVICE) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert_close(*runs, 0.0)
