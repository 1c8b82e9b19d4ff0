"""Block masks made by arithmetic: those of PyTorch's dense way, and without anything dense on the way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from hymba_train.ops.attention_blocks import block_mask
from hymba_train.ops.attention_flex import attention_flex, mask_mod

CPU = torch.device("cpu")


def rows_of(lengths: list[list[int]], num_tokens: int) -> torch.Tensor:
    """Segment ids [B, S] of documents of these lengths, cut or followed by one more to fill S; ids have gaps."""
    rows = []
    for row in lengths:
        ids = [3 * number for number, length in enumerate(row) for _ in range(length)]
        rows.append((ids + [3 * len(row)] * num_tokens)[:num_tokens])
    return torch.tensor(rows)


def blocks(mask) -> list:
    """What a kernel reads of a block mask: for each (row, query block) its partial and its full key blocks."""
    found = []
    for count, index in (
        (mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices),
        (mask.q_num_blocks, mask.q_indices), (mask.full_q_num_blocks, mask.full_q_indices),
    ):  # fmt: skip
        listed = zip(count.flatten().tolist(), index.flatten(0, -2).tolist(), strict=True)
        found.append([indices[:number] for number, indices in listed])
    return found


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1, 700),
    num_meta=st.sampled_from([0, 1, 5, 127, 128, 129, 256]),
    window=st.one_of(st.none(), st.integers(0, 400)),
    lengths=st.one_of(st.none(), st.lists(st.lists(st.integers(1, 300), max_size=8), min_size=1, max_size=2)),
)
def test_every_block_is_as_in_the_dense_way(num_tokens, num_meta, window, lengths):
    ids = None if lengths is None else rows_of(lengths, num_tokens)
    visible = mask_mod(num_meta, window, ids)
    rows = None if ids is None else ids.shape[0]
    expected = create_block_mask(visible, rows, None, num_tokens, num_meta + num_tokens, device="cpu")
    found = block_mask(num_tokens, num_meta, window, ids, visible, CPU)
    assert blocks(found) == blocks(expected)
    assert (found.seq_lengths, found.BLOCK_SIZE, found.shape) == (
        expected.seq_lengths, expected.BLOCK_SIZE, expected.shape,
    )  # fmt: skip


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("window", [None, 1024])
def test_nothing_of_s_by_s_is_made(window):
    num_tokens = 8192
    ids = rows_of([[700, 3000, 20, 4000], [8192]], num_tokens)
    visible = mask_mod(128, window, ids)
    with Largest() as largest:
        block_mask(num_tokens, 128, window, ids, visible, CPU)
    assert 0 < largest.elements <= 2 * num_tokens
    with Largest() as largest:  # the yardstick sees a dense mask where there is one
        create_block_mask(visible, 2, None, 1024, 1152, device="cpu")
    assert largest.elements >= 2 * 1024 * 1152


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1024])
def test_memory_of_a_packed_pass_on_a_gpu_has_no_room_for_a_dense_mask(window):
    """Forward and backward over 16,384 packed tokens: one byte a pair would be 268 MB."""
    num_tokens = 16_384
    generator = torch.Generator("cuda").manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()

    text = [random(1, num_tokens, 1, width) for width in (64, 64, 64)]
    meta = [random(128, 1, width) for width in (64, 64, 64)]

    def run() -> None:
        ids = rows_of([[700, 3000, 20, 4000]], num_tokens).cuda()  # a micro-batch of its own: its mask is made anew
        out, meta_out = attention_flex(*text, *meta, window=window, scale=0.125, segment_ids=ids)
        (out.sum() + meta_out.sum()).backward()

    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    assert torch.cuda.max_memory_allocated() - before < num_tokens**2 / 2
