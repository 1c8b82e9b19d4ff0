"""Attention backends against the visibility rule written out pair by pair, in float64."""

import math

import pytest
import torch

from hymba_train.ops import BACKENDS
from hymba_train.ops.attention import attention
from hymba_train.ops.attention_flex import _text_block_mask, attention_flex, mask_mod
from hymba_train.ops.segments import document_offsets

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
SCALE = 0.3
UNEVEN = torch.tensor([0, 0, 0, 1, 1])


def inputs(B=2, S=9, M=5, H=4, G=2, dk=4, dv=6, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, S, H, dk), (B, S, G, dk), (B, S, G, dv), (M, H, dk), (M, G, dk), (M, G, dv)]
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]
    return [x.requires_grad_() for x in made]


def segments(B, S, every=4):
    """Documents of different lengths in each row; ids with gaps."""
    generator = torch.Generator().manual_seed(5)
    return torch.cumsum((torch.rand(B, S, generator=generator) < 1 / every).long() * 3, dim=1)


def sees(i, j, num_meta, window, documents, positions):
    """The rule of hymba-architecture 2.7, for rows [meta | text]."""
    is_meta = j < num_meta
    if not is_meta and (i < num_meta or documents[i] != documents[j]):
        return False
    distance = positions[i] - positions[j]
    return distance >= 0 and (window is None or distance <= window or is_meta)


def formula(q, k, v, meta_q, meta_k, meta_v, *, window, scale, kv_index=None, segment_ids=None):
    """Each row as one sequence [meta | text], one dense softmax."""
    B, S, H, _ = q.shape
    M, G = meta_k.shape[0], k.shape[2]
    kv_index = torch.arange(H) // (H // G) if kv_index is None else kv_index
    outs, meta_out = [], None
    for b in range(B):
        offsets = torch.arange(S) if segment_ids is None else document_offsets(segment_ids[b : b + 1])[0]
        positions = [*range(M), *(M + offsets).tolist()]
        documents = [None] * M + ([0] * S if segment_ids is None else segment_ids[b].tolist())
        visible = torch.tensor(
            [[sees(i, j, M, window, documents, positions) for j in range(M + S)] for i in range(M + S)],
            dtype=torch.bool,
        ).view(M + S, M + S)
        query = torch.cat((meta_q, q[b]))
        key, value = torch.cat((meta_k, k[b]))[:, kv_index], torch.cat((meta_v, v[b]))[:, kv_index]
        scores = torch.einsum("ihd,jhd->hij", query, key) * scale
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        out = torch.einsum("hij,jhd->ihd", weights, value)
        outs.append(out[M:])
        meta_out = out[:M]
    return torch.stack(outs), meta_out


def outputs_and_gradients(function, tensors, **kwargs):
    results = function(*tensors, **kwargs)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results]
    total = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
    return [*results, *torch.autograd.grad(total, tensors, allow_unused=True, materialize_grads=True)]


GRID = [
    dict(window=None), dict(window=0), dict(window=3), dict(window=3, packed=True), dict(window=None, packed=True),
    dict(window=3, packed=True, M=0), dict(window=2, M=1, H=5, kv_index=UNEVEN), dict(window=None, H=3, G=3),
    dict(window=20, S=70, packed=True, M=3), dict(window=80, S=130, B=1, M=2), dict(window=1, S=1), dict(window=1, S=0),
]  # fmt: skip


def unpack(case):
    case = dict(case)
    window, packed, kv_index = case.pop("window"), case.pop("packed", False), case.pop("kv_index", None)
    tensors = inputs(**case)
    ids = segments(*tensors[0].shape[:2]) if packed else None
    return tensors, dict(window=window, scale=SCALE, kv_index=kv_index, segment_ids=ids)


@pytest.mark.parametrize("backend", [b for b in BACKENDS["attention"] if "cpu" in b.device_types], ids=lambda b: b.name)
@pytest.mark.parametrize("case", GRID, ids=str)
def test_every_backend_of_the_cpu_equals_the_formula(case, backend):
    tensors, kwargs = unpack(case)
    expected = outputs_and_gradients(formula, tensors, **kwargs)
    found = outputs_and_gradients(backend.function, tensors, **kwargs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", GRID, ids=str)
def test_flex_equals_formula_forward(case):
    """FlexAttention has no backward on a CPU."""
    tensors, kwargs = unpack(case)
    with torch.no_grad():
        expected = formula(*tensors, **kwargs)
        found = attention_flex(*(x.float() for x in tensors), **kwargs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("window", "num_meta", "packed"), [(None, 0, False), (5, 3, False), (5, 3, True), (0, 1, True)]
)
def test_flex_mask_is_the_rule(window, num_meta, packed):
    B, S = 2, 30
    ids = segments(B, S) if packed else None
    visible = mask_mod(num_meta, window, ids)
    for b in range(B):
        offsets = torch.arange(S) if ids is None else document_offsets(ids[b : b + 1])[0]
        positions = [*range(num_meta), *(num_meta + offsets).tolist()]
        documents = [None] * num_meta + ([0] * S if ids is None else ids[b].tolist())
        for i in range(S):
            keys = torch.arange(num_meta + S)
            found = visible(torch.tensor(b), torch.tensor(0), torch.tensor(i), keys).tolist()
            expected = [sees(num_meta + i, j, num_meta, window, documents, positions) for j in range(num_meta + S)]
            assert found == expected, (b, i)


def test_flex_layers_share_block_masks():
    ids = segments(2, 20)
    first = _text_block_mask(20, 3, 4, ids, ids.device)
    assert _text_block_mask(20, 3, 4, ids, ids.device) is first
    assert _text_block_mask(20, 3, None, ids, ids.device) is not first
    again = ids.clone()
    second = _text_block_mask(20, 3, 4, again, ids.device)
    assert second is not first
    again[:, 10:] += 1  # in place: the same tensor object with other documents
    assert _text_block_mask(20, 3, 4, again, ids.device) is not second
    with torch.inference_mode():  # whose tensors do not count such changes
        unversioned = ids.clone()
        assert _text_block_mask(20, 3, 4, unversioned, ids.device) is not _text_block_mask(
            20, 3, 4, unversioned, ids.device
        )


@pytest.mark.parametrize("backend", [attention, attention_flex])
@pytest.mark.parametrize("window", [0, 1, 7, 64])
def test_window_holds_w_plus_one_keys_and_every_meta_token(backend, window):
    """Equal scores and one-hot values: the output counts the visible keys."""
    S, M = 80, 3
    q, k, meta_q, meta_k = (
        torch.zeros(1, S, 1, 16),
        torch.zeros(1, S, 1, 16),
        torch.zeros(M, 1, 16),
        torch.zeros(M, 1, 16),
    )
    values = torch.eye(M + S).unsqueeze(1)
    with torch.no_grad():
        out, _ = backend(q, k, values[None, M:], meta_q, meta_k, values[:M], window=window, scale=1.0)
    visible = out[0, :, 0] > 0
    for s in range(S):
        expected = [*range(M), *range(M + max(0, s - window), M + s + 1)]
        assert visible[s].nonzero().flatten().tolist() == expected


def test_meta_prefix_equals_concatenated_sequence():
    """The prefix computed once equals rows of [meta | text] that have no meta tokens."""
    M = 5
    tensors = inputs(S=6, M=M)

    def concatenated(q, k, v, meta_q, meta_k, meta_v):
        rows = [torch.cat((m.expand(2, *m.shape), t), 1) for t, m in ((q, meta_q), (k, meta_k), (v, meta_v))]
        none = [m[:0] for m in (meta_q, meta_k, meta_v)]
        out, _ = attention(*rows, *none, window=None, scale=SCALE)
        return out[:, M:], out[0, :M]

    expected = outputs_and_gradients(concatenated, tensors)
    found = outputs_and_gradients(attention, tensors, window=None, scale=SCALE)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_packed_documents_equal_documents_alone():
    lengths = [1, 5, 80, 3]
    tensors = inputs(B=1, S=sum(lengths), M=4)
    ids = torch.repeat_interleave(torch.tensor([0, 1, 5, 6]), torch.tensor(lengths))[None]

    def alone(q, k, v, *meta):
        parts = [attention(*(x[:, a:b] for x in (q, k, v)), *meta, window=6, scale=SCALE) for a, b in spans(lengths)]
        return torch.cat([p[0] for p in parts], 1), parts[0][1]

    expected = outputs_and_gradients(alone, tensors)
    found = outputs_and_gradients(attention, tensors, window=6, scale=SCALE, segment_ids=ids)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def spans(lengths):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_torch_in_low_precision(dtype, tolerance):
    tensors = inputs(S=70)
    expected = outputs_and_gradients(formula, tensors, window=9, scale=SCALE)
    low = [x.detach().to(dtype).requires_grad_() for x in tensors]
    found = outputs_and_gradients(attention, low, window=9, scale=SCALE)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kv_index", [None, UNEVEN])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_equals_torch_on_gpu(dtype, window, kv_index, packed):
    H = 10 if kv_index is None else 5
    tensors = inputs(B=2, S=512, M=128, H=H, G=2, dk=64, dv=128, dtype=dtype, device="cuda")
    ids = segments(2, 512, every=60).cuda() if packed else None
    kwargs = dict(window=window, scale=0.125, kv_index=None if kv_index is None else kv_index.cuda(), segment_ids=ids)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    expected = outputs_and_gradients(attention, wide, **kwargs)
    found = outputs_and_gradients(attention_flex, tensors, **kwargs)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 5e-3  # flex may take TF32 for float32 scores
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()
