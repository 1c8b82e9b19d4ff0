"""Row-wise Triton ops (norms, average, SwiGLU, RoPE) against their plain-torch backends in float64."""

import pytest
import torch

from hymba_train.errors import UserError
from hymba_train.ops.branch_norms import normed_average
from hymba_train.ops.gradient_slots import split_columns
from hymba_train.ops.rms_norm import add_rms_norm, aligned, group_rms_norm, rms_norm
from hymba_train.ops.rope import rope_tables, rotate_heads
from hymba_train.ops.swiglu import swiglu
from tests.ops.fused import DEVICE, DTYPES, INTERPRET, check, needs_triton, outputs_and_gradients, random

pytestmark = needs_triton
dtypes = pytest.mark.parametrize("dtype", DTYPES)
EPS = 1e-6


def strided(function, position, width):
    """function, given a slice of rows 2 * width + 5 columns wide in place of its argument."""

    def call(*args):
        wide, at = args[position], width // 2 + 3
        return function(*args[:position], wide[..., at : at + width], *args[position + 1 :])

    return call


@dtypes
@pytest.mark.parametrize("shape", [(1, 16), (5, 1, 100), (2, 17, 96), (33, 1600)])
def test_rms_norm(dtype, shape):
    from hymba_train.ops.rms_norm_triton import rms_norm_triton

    tensors = [3 * random(*shape), random(shape[-1])]
    check(lambda *t: rms_norm_triton(*t, EPS), lambda *t: rms_norm(*t, EPS), tensors, dtype, keep={1})


@dtypes
@pytest.mark.parametrize("width", [16, 100])
def test_rms_norm_of_a_slice(dtype, width):
    from hymba_train.ops.rms_norm_triton import rms_norm_triton

    tensors = [random(19, 2 * width + 5), random(width)]
    fused = strided(lambda *t: rms_norm_triton(*t, EPS), 0, width)
    plain = strided(lambda *t: rms_norm(*t, EPS), 0, width)
    check(fused, plain, tensors, dtype, keep={1})


@dtypes
@pytest.mark.parametrize("shape", [(1, 16), (19, 1, 100), (35, 96)])
def test_add_rms_norm(dtype, shape):
    from hymba_train.ops.rms_norm_triton import add_rms_norm_triton

    tensors = [random(*shape), random(*shape, seed=1), random(shape[-1])]
    plain = lambda *t: add_rms_norm(*t, EPS)  # noqa: E731
    check(lambda *t: add_rms_norm_triton(*t, EPS), plain, tensors, dtype, keep={2})


@pytest.mark.parametrize("used", [0, 1])
def test_add_rms_norm_with_one_output_used(used):
    from hymba_train.ops.rms_norm_triton import add_rms_norm_triton

    tensors = [random(3, 24), random(3, 24, seed=1), random(24)]
    check(
        lambda *t: add_rms_norm_triton(*t, EPS)[used], lambda *t: add_rms_norm(*t, EPS)[used], tensors,
        torch.float32,
    )  # fmt: skip


@pytest.mark.skipif(INTERPRET, reason="Triton's interpreter cuts bf16 off where the GPU rounds")
def test_rms_norm_rounds_before_the_weight():
    """T5's order, bit for bit, in bf16."""
    from hymba_train.ops.rms_norm_triton import rms_norm_triton

    x, weight = random(64, 32).bfloat16() * 3, random(32).float()
    found = rms_norm_triton(x.to(DEVICE), weight.to(DEVICE), EPS).cpu()
    expected = rms_norm(x.double(), torch.ones(32), EPS).float().bfloat16() * weight.bfloat16()
    assert (found != expected).float().mean() < 0.01  # 1 / sqrt in float32 may round the other way


@dtypes
@pytest.mark.parametrize("shape", [(1, 16), (2, 9, 100), (18, 1, 320)])
@pytest.mark.parametrize("ranks", [0, 1, 2])
def test_normed_average(dtype, shape, ranks):
    """ranks 0: not split. 1, 2: sums go through all_reduce, which for 2 equal ranks doubles them."""
    from hymba_train.ops.normed_average_triton import normed_average_triton

    all_reduce = {0: None, 1: lambda t: None, 2: lambda t: t.mul_(2)}[ranks]
    constants = (EPS, max(1, ranks) * shape[-1] - 3, all_reduce)  # some channels are padding
    tensors = [random(*shape), 2 * random(*shape, seed=1), random(shape[-1]), random(shape[-1], seed=1)]
    check(
        lambda *t: normed_average_triton(*t, *constants), lambda *t: normed_average(*t, *constants),
        tensors, dtype, keep={2, 3},
    )  # fmt: skip


@dtypes
@pytest.mark.parametrize("shape", [(1, 2), (5, 1, 90), (2, 3, 2600)])
def test_swiglu(dtype, shape):
    from hymba_train.ops.swiglu_triton import swiglu_triton

    check(swiglu_triton, swiglu, [4 * random(*shape)], dtype)


def test_swiglu_does_not_overflow():
    from hymba_train.ops.swiglu_triton import swiglu_triton

    x = torch.tensor([[-200.0, -90.0, 90.0, 200.0, 1.0, 1.0, 1.0, 1.0]])
    check(swiglu_triton, swiglu, [x.double()], torch.float32)


@pytest.mark.parametrize("dtype", [*DTYPES[:1], pytest.param(torch.bfloat16, id="bf16")])
@pytest.mark.parametrize("heads", [1, 3, 5])
@pytest.mark.parametrize("columns", [0, 7])
def test_rotate_heads(dtype, heads, columns):
    """From a slice of wider rows; ``columns`` of padding heads behind the heads."""
    from hymba_train.ops.rope_triton import rotate_heads_triton

    rows, width = 7, 16
    cos, sin = rope_tables(torch.randint(0, 4000, (rows,)), width, 1e4)
    low = lambda t: t.to(dtype)  # the tables are rounded to x's type  # noqa: E731
    used = heads * width + columns

    def plain(x):
        return rotate_heads(x[:, 5 : 5 + used], low(cos).double(), low(sin).double(), heads)

    def fused(x):
        out = rotate_heads_triton(x[:, 5 : 5 + used], cos.to(DEVICE), sin.to(DEVICE), heads)
        assert out.is_contiguous()
        return out

    check(fused, plain, [random(rows, used + 11)], dtype)


@pytest.mark.parametrize("used", [(0, 1, 2), (1,)])
@pytest.mark.parametrize("columns", [0, 7])
def test_rotated_rows_in_parts(used, columns):
    """Parts of the rows; the gradient of one that nothing uses is zero."""
    from hymba_train.ops.rope_triton import rotate_heads_triton

    counts, heads, width = (3, 4, 2), 2, 16
    cos, sin = rope_tables(torch.arange(9), width, 1e4)

    def call(rotate, x):
        part = split_columns(x, [5, heads * width + columns])[1]
        parts = rotate(part, cos.to(x.device, x.dtype), sin.to(x.device, x.dtype), heads, counts)
        return tuple(parts[i] for i in used)

    check(
        lambda x: call(rotate_heads_triton, x), lambda x: call(rotate_heads, x),
        [random(9, 5 + heads * width + columns)], torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40])
def test_weight_gradients_have_the_same_bits_every_time(rows):
    from hymba_train.ops.normed_average_triton import normed_average_triton

    tensors = [random(rows, 48), random(rows, 48, seed=1), random(48), random(48, seed=1)]

    def run():
        return outputs_and_gradients(lambda *t: normed_average_triton(*t, EPS, 48), tensors, torch.float32, DEVICE)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_gradients_go_straight_into_the_slots_of_a_split():
    """in_proj's output: q is rotated, a and s are averaged; their gradients are never copied."""
    from hymba_train.ops.normed_average_triton import normed_average_triton
    from hymba_train.ops.rope_triton import rotate_heads_triton

    rows, widths = 6, [32, 48, 48]
    cos, sin = rope_tables(torch.arange(rows), 16, 1e4)
    weights = [random(48).float().to(DEVICE), random(48, seed=1).float().to(DEVICE)]
    x = random(rows, sum(widths)).float().to(DEVICE)

    def run(split, rotate, average, *tables):
        leaf = x.clone().requires_grad_()
        q, a, s = split(leaf)
        out = (rotate(q, *tables, 2).square().sum() + average(a, s, *weights, EPS, 48).square().sum(),)
        return torch.autograd.grad(out, leaf)[0]

    tables = cos.to(DEVICE), sin.to(DEVICE)
    copies = []
    original = torch.Tensor.copy_
    torch.Tensor.copy_ = lambda self, *args: copies.append(self.shape) or original(self, *args)
    try:
        found = run(lambda t: split_columns(t, widths), rotate_heads_triton, normed_average_triton, *tables)
    finally:
        torch.Tensor.copy_ = original
    if not INTERPRET:  # whose stores are copies
        assert not copies
    expected = run(lambda t: t.split(widths, -1), rotate_heads, normed_average, *tables)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@dtypes
@pytest.mark.parametrize(
    ("widths", "alignment"), [([100, 16, 16], 1), ([100, 16, 16], 8), ([7, 3], 1), ([7, 3], 4), ([20], 1), ([5], 8)]
)
def test_group_rms_norm(dtype, widths, alignment):
    """Whatever lies between the groups changes nothing."""
    from hymba_train.ops.group_rms_norm_triton import group_rms_norm_triton

    tensors = [random(2, 17, sum(aligned(w, alignment) for w in widths)), *(random(w) for w in widths)]
    check(
        lambda x, *w: group_rms_norm_triton(x, w, EPS, alignment), lambda x, *w: group_rms_norm(x, w, EPS, alignment),
        tensors, dtype, keep=set(range(1, 4)),
    )  # fmt: skip


def test_groups_lie_at_multiples_of_the_alignment():
    x, weights = random(3, 16), [random(5), random(3)]
    found = group_rms_norm(x, weights, EPS, 8)
    torch.testing.assert_close(found[:, :5], rms_norm(x[:, :5], weights[0], EPS))
    torch.testing.assert_close(found[:, 8:11], rms_norm(x[:, 8:11], weights[1], EPS))
    assert not found[:, 5:8].any()
    assert not found[:, 11:].any()


def test_more_than_three_groups_are_refused():
    from hymba_train.ops.group_rms_norm_triton import group_rms_norm_triton

    with pytest.raises(UserError, match="takes 3 groups"):
        group_rms_norm_triton(torch.zeros(2, 4), [torch.ones(1)] * 4, EPS)
