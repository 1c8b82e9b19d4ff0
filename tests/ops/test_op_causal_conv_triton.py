"""The Triton convolution against the plain-torch one (held to its formula in test_op_causal_conv), in float64."""

import pytest
import torch

from hymba_train.errors import UserError
from hymba_train.ops.causal_conv import causal_conv, causal_conv_rows
from hymba_train.ops.gradient_slots import split_columns
from tests.ops.fused import DEVICE, DTYPES, assert_close, check, needs_triton, outputs_and_gradients, random

pytestmark = needs_triton
PACKED = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 5, 5, 5, 6, 7, 7, 7, 7], [3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4]])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    from hymba_train.ops import causal_conv_triton

    monkeypatch.setattr(causal_conv_triton, "FORWARD_CHUNK", 8)
    monkeypatch.setattr(causal_conv_triton, "BACKWARD_CHUNK", 8)


def fused(*args, **kwargs):
    from hymba_train.ops.causal_conv_triton import causal_conv_triton

    kwargs = {k: v.to(DEVICE) if k == "segment_ids" and v is not None else v for k, v in kwargs.items()}
    return causal_conv_triton(*args, **kwargs)


def inputs(B=2, S=15, C=5, taps="shared"):
    initial = {"shared": [random(3, C)], "rows": [random(B, 3, C)], "none": []}[taps]
    return [random(B, S, C), random(C, 4), random(C), *initial]


def both(ids=None, **cut):
    """(fused, plain) as functions of tensors, with these segment_ids."""

    def bind(function):
        def call(x, weight, bias, taps=None):
            return function(x, weight, bias, initial_taps=taps, segment_ids=ids)

        return call

    return bind(fused), bind(causal_conv)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", ["shared", "rows", "none"])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_plain(dtype, taps, packed):
    check(*both(PACKED if packed else None), inputs(taps=taps), dtype)


@pytest.mark.parametrize("S", [1, 2, 3, 4, 7, 8, 9, 11, 16, 17, 26])
def test_lengths_around_chunk_borders(S):
    check(*both(), inputs(B=1, S=S, C=3), torch.float32)


@pytest.mark.parametrize("seed", range(6))
def test_documents_anywhere(seed):
    """Starts at random places, next to one another and to chunk borders."""
    generator = torch.Generator().manual_seed(seed)
    S = int(torch.randint(1, 30, (), generator=generator))
    ids = torch.cumsum((torch.rand(2, S, generator=generator) < 0.3).long(), 1)
    check(*both(ids), inputs(S=S, C=2), torch.float32)


def test_no_tokens():
    out, final = fused(*(t.float().to(DEVICE) for t in inputs(S=0, taps="none")))
    assert out.shape == (2, 0, 5)
    assert final.shape == (2, 3, 5)


def test_more_channels_than_one_program(monkeypatch):
    from hymba_train.ops import causal_conv_triton

    monkeypatch.setattr(causal_conv_triton, "FORWARD_CHANNELS", 32)
    monkeypatch.setattr(causal_conv_triton, "BACKWARD_CHANNELS", 16)
    check(*both(PACKED), inputs(C=33), torch.float32)


def test_final_taps_alone_carry_gradients():
    """As the meta tokens' do, when only their state is used."""
    plain, function = both()[::-1]
    for ids in (None, PACKED):
        function, plain = both(ids)
        check(lambda *t, f=function: f(*t)[1], lambda *t, p=plain: p(*t)[1], inputs(), torch.float32)


def test_other_widths_are_refused():
    with pytest.raises(UserError, match=r"needs mamba_conv_width=4, not 3; use 'torch'"):
        fused(torch.zeros(1, 2, 3), torch.zeros(3, 3), torch.zeros(3))


# -- the flat token axis --------------------------------------------------------------------------------------


def rows_functions(num_meta, ids, split=False, batch=2, seq=15):
    from hymba_train.ops.causal_conv_triton import causal_conv_rows_triton

    sizes = dict(num_meta=num_meta, batch=batch, seq=seq)

    def fused(x, weight, bias):
        x = split_columns(x, [3, 5, 4])[1] if split else x[:, 3:8]
        return causal_conv_rows_triton(x, weight, bias, segment_ids=None if ids is None else ids.to(DEVICE), **sizes)

    return fused, lambda x, w, b: causal_conv_rows(x[:, 3:8], w, b, segment_ids=ids, **sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_meta", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_rows_equal_plain(dtype, num_meta, packed, split):
    """From a slice of wider rows, with two rows of padding behind the text."""
    tensors = [random(num_meta + 30 + 2, 12), random(5, 4), random(5)]
    function, plain = rows_functions(num_meta, PACKED if packed else None, split)
    tensors[0][num_meta + 30 :] = 0
    check(function, plain, tensors, dtype)


def test_weight_gradients_have_the_same_bits_every_time():
    function, _ = both(PACKED)
    runs = [outputs_and_gradients(function, inputs(), torch.float32, DEVICE) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert_close(*runs, 0.0)
