"""Attention backend ``cudnn``: on the CPU its own part (Triton's interpreter, TRITON_INTERPRET=1), cuDNN on a GPU."""

import importlib.util
import os

import pytest
import torch

from hymba_train.ops import attention_cudnn as module
from hymba_train.ops.attention import attention, visible_text
from hymba_train.ops.attention_rows import attention_rows
from hymba_train.ops.registry import BACKENDS, Choice
from hymba_train.ops.segments import document_ends
from tests.ops.fused import assert_close, random
from tests.ops.fused import outputs_and_gradients as fused_outputs
from tests.ops.test_op_attention import UNEVEN, inputs, outputs_and_gradients, segments

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def scores_of(q, k, window, scale, ids):
    """float64 [B, H, S, S], -inf where not visible; k as [B, S, H, dk]."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * scale
    visible = visible_text(0, q.shape[1], 0, window, ids, q.device)
    return scores.masked_fill(~visible[:, None], -torch.inf)


class PlainCudnn:
    """What cuDNN computes, in float64: causal attention over the text, and its share of a merged softmax's gradient."""

    def __init__(self, ids):
        self.ids = ids

    def forward(self, q, k, v, window, scale, ends):
        scores = scores_of(q, k, window, scale, None if ends is None else self.ids)
        share = q.shape[2] // k.shape[2]
        out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v.double().repeat_interleave(share, 2))
        lse = scores.logsumexp(-1, keepdim=True).float()
        if ends is not None:
            lse = lse[..., 0].transpose(1, 2).flatten(0, 1).unsqueeze(-1).contiguous()
        return out.to(q.dtype).contiguous(), lse, torch.zeros(2)

    def backward(self, q, k, v, out, d_out, lse, rng_state, window, scale, ends):
        batch, seq, heads, _ = q.shape
        if ends is not None:
            lse = lse[..., 0].view(batch, seq, heads).transpose(1, 2).unsqueeze(-1)
        share = heads // k.shape[2]
        weights = torch.exp(scores_of(q, k, window, scale, None if ends is None else self.ids) - lse.double())
        d_out, out = d_out.double(), out.double()
        wide_v, wide_k = (x.double().repeat_interleave(share, 2) for x in (v, k))
        d_weights = torch.einsum("bihd,bjhd->bhij", d_out, wide_v)
        delta = (d_out * out).sum(-1).transpose(1, 2).unsqueeze(-1)
        d_scores = weights * (d_weights - delta) * scale
        d_q = torch.einsum("bhij,bjhd->bihd", d_scores, wide_k)
        d_k = torch.einsum("bhij,bihd->bjhd", d_scores, q.double())
        d_v = torch.einsum("bhij,bihd->bjhd", weights, d_out)
        fold = lambda x: x.unflatten(2, (-1, share)).sum(3)  # noqa: E731
        return tuple(g.to(q.dtype).contiguous() for g in (d_q, fold(d_k), fold(d_v)))


@pytest.mark.skipif(
    not INTERPRET or importlib.util.find_spec("triton") is None, reason="needs triton and TRITON_INTERPRET=1"
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_index", "num_meta", "programs", "rows"),
    [(4, None, 5, 4, 16), (5, UNEVEN, 16, 6, 16), (4, None, 16, 500, 128), (4, None, 0, 4, 16)],
)
def test_meta_keys_join_the_text(monkeypatch, heads, kv_index, num_meta, programs, rows, packed):
    """``programs`` in all: several items each, or one. 128 rows are more than a sequence has."""
    tensors = inputs(B=2, S=70, M=num_meta, H=heads, G=2, dk=16, dv=32, dtype=torch.float32)
    ids = segments(2, 70, every=20) if packed else None
    plain = PlainCudnn(ids)
    monkeypatch.setattr(module, "fused_forward", plain.forward)
    monkeypatch.setattr(module, "fused_backward", plain.backward)
    monkeypatch.setattr(module, "multiprocessors", lambda device: programs)
    monkeypatch.setattr(module, "ROWS", rows)
    kwargs = dict(window=9, scale=0.3, kv_index=kv_index, segment_ids=ids)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    expected = outputs_and_gradients(attention, wide, **kwargs)
    found = outputs_and_gradients(module.attention_cudnn, tensors, **kwargs)
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


@pytest.mark.skipif(
    not INTERPRET or importlib.util.find_spec("triton") is None, reason="needs triton and TRITON_INTERPRET=1"
)
@pytest.mark.parametrize(("kv_index", "padding", "packed"), [(None, 0, True), (UNEVEN, 3, False), (None, 3, False)])
def test_rows_equal_their_parts(monkeypatch, kv_index, padding, packed):
    """The function on flat rows against plain attention with rows split and joined: output and all gradients."""
    B, S, M, G, dk, dv = 2, 24, 5, 2, 16, 32
    heads, rows = 4 if kv_index is None else len(kv_index), M + B * S + padding
    ids = segments(B, S, every=10) if packed else None
    plain = PlainCudnn(ids)
    monkeypatch.setattr(module, "fused_forward", plain.forward)
    monkeypatch.setattr(module, "fused_backward", plain.backward)
    monkeypatch.setattr(module, "ROWS", 16)
    tensors = [random(M, heads, dk), random(B * S, heads, dk), random(rows, G * dk), random(rows, G * dv)]
    kwargs = dict(batch=B, window=9, scale=0.3, kv_index=kv_index, segment_ids=ids)
    expected, found = (
        fused_outputs(lambda *t, name=name: attention_rows(chosen(name), *t, **kwargs), tensors, dtype, "cpu")
        for name, dtype in (("torch", torch.float64), ("cudnn", torch.float32))
    )
    assert not found[0][M + B * S :].any()
    assert_close(found, expected, 2e-5)


def chosen(name):
    return Choice(next(b for b in BACKENDS["attention"] if b.name == name), "cpu", "test")


def test_ends_of_documents():
    ids = torch.tensor([[0, 0, 1, 1], [1, 2, 2, 5]])
    assert document_ends(ids).tolist() == [0, 2, 4, 5, 7, 8]
    assert document_ends(ids, 4).tolist() == [0, 2, 4, 5, 7, 8, 8, 8, 8]
    assert document_ends(ids, 5).tolist() == [0, 2, 4, 5, 7, 8]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("heads", "kv_index"), [(10, None), (5, UNEVEN)])
@pytest.mark.parametrize("window", [None, 100])
def test_equals_torch_on_gpu(window, heads, kv_index, packed):
    tensors = inputs(B=2, S=512, M=128, H=heads, G=2, dk=64, dv=128, dtype=torch.bfloat16, device="cuda")
    ids = segments(2, 512, every=60).cuda() if packed else None
    kv_index = None if kv_index is None else kv_index.cuda()
    kwargs = dict(window=window, scale=0.125, kv_index=kv_index, segment_ids=ids)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    expected = outputs_and_gradients(attention, wide, **kwargs)
    found = outputs_and_gradients(module.attention_cudnn, tensors, **kwargs)
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= 1e-2 * b.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_empty_documents_at_the_end_change_nothing_on_gpu():
    """What lets a batch's document count be rounded up, so that cuDNN plans few sizes."""
    tensors = inputs(B=2, S=512, M=128, H=10, G=2, dk=64, dv=128, dtype=torch.bfloat16, device="cuda")
    ids = segments(2, 512, every=60).cuda()
    ends, padded = document_ends(ids), document_ends(ids, 32)
    kwargs = dict(window=100, scale=0.125, segment_ids=ids)
    exact, rounded = (
        outputs_and_gradients(module.attention_cudnn, tensors, document_ends=e, **kwargs) for e in (ends, padded)
    )
    for a, b in zip(exact, rounded, strict=True):
        assert (a.float() - b.float()).norm() <= 1e-3 * b.float().norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", [False, True])
def test_two_runs_give_the_same_bits_on_gpu(packed):
    tensors = inputs(B=2, S=1024, M=128, H=10, G=2, dk=64, dv=128, dtype=torch.bfloat16, device="cuda")
    ids = segments(2, 1024, every=90).cuda() if packed else None
    torch.use_deterministic_algorithms(True)
    try:
        runs = [
            outputs_and_gradients(module.attention_cudnn, tensors, window=100, scale=0.125, segment_ids=ids)
            for _ in range(3)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
