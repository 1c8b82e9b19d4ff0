"""Matrix products of a step as torch's own counter sees them, against the formula that MFU is quoted with."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hymba_train.describe.flops import BACKWARD_FACTOR, flops_per_token
from hymba_train.describe.saved import GROUP_ALIGNMENT
from hymba_train.model import build_model_chunks
from tests.train.tiny_run import tiny_config

BATCH, SEQ = 3, 24
GEMM_PARTS = ("in_proj", "out_proj", "ffn", "ssm_proj", "head")


def addmm_in_place(added, left, right, out_shape=None, **options) -> int:
    """torch counts addmm, but not where it adds to its argument, as the backward pass of x_proj does."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("pattern", [["hybrid"], ["ssm", "attention:no_ffn"], ["mamba2", "hybrid"]], ids="-".join)
def test_matrix_products_equal_the_formula(tmp_path, lone_runtime, pattern):
    """Exactly. Attention and Mamba-2's scan are batched products and Mamba-1's scan is elementwise: none of them is
    counted as one of these."""
    shared = [[1, 2]] if pattern == ["hybrid"] else []
    # Groups of x_proj as wide as they are computed: padding is not in the formula.
    exact = {
        "model.mamba_dt_rank": GROUP_ALIGNMENT,
        "model.mamba_state_dim": GROUP_ALIGNMENT,
        "model.mamba2_head_dim": 8,
    }
    if "mamba2" in pattern:
        exact["model.branch_fusion"] = "concat"
    config = tiny_config(tmp_path, **{"model.layer_pattern": pattern, "model.kv_groups": shared}, **exact)
    model = config.model
    assert model.vocab_size % model.make_vocab_size_divisible_by == 0
    (chunk,) = build_model_chunks(config, lone_runtime, [range(model.num_layers)])
    tokens = torch.randint(1, model.vocab_size, (BATCH, SEQ))
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_in_place}) as counter:
        chunk(tokens=tokens, labels=tokens).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(flops for op, flops in counted.items() if str(op) in ("aten.mm", "aten.addmm", "aten.addmm_"))
    parts = flops_per_token(model, SEQ, sequences_per_prefix=BATCH)
    expected = BACKWARD_FACTOR * sum(parts[part] for part in GEMM_PARTS) * BATCH * SEQ
    assert products == pytest.approx(expected, rel=1e-12)
