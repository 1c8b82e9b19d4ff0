"""The lists of saved tensors against what autograd saves, for the backends that need a GPU."""

import pytest
import torch

from tests.describe.test_saved_activations import BF16, BIG, case, compare, measure
from tests.distributed.cases import SINGLE, config_of
from tests.model.test_golden import build

pytestmark = pytest.mark.gpu

SETTINGS = [  # attention, scan, layer, layout, whether documents are kept apart
    ("flex", "cuda", 0, "single", False),
    ("flex", "cuda", 1, "single", True),
    ("flex", "triton", 2, "single", True),
    ("flex", "torch", 1, "tp2", False),
    ("flex", "cuda", 2, "tp2", False),
    ("cudnn", "cuda", 1, "single", True),
    ("cudnn", "cuda", 2, "single", False),
    ("cudnn", "triton", 1, "tp2", False),
]


@pytest.mark.parametrize(("attention", "scan", "layer", "layout", "documents"), SETTINGS)
def test_lists_hold_what_is_saved_on_a_gpu(attention, scan, layer, layout, documents):
    backends = [f"precision.attention_backend={attention}", f"precision.scan_backend={scan}"]
    one = case([*BIG, *BF16, *backends, f"parallel={layout}"], layer, 1024, "cuda", documents)
    compare(one, measure({"one": one})["one"])


def test_a_backward_pass_leaves_nothing_while_the_loss_lives(gpu_runtime):
    """Megatron-Core's schedules hold the last micro-batch's output, and so its nodes, through the next forward pass."""
    model = build(config_of("wide", SINGLE, "cuda").model, gpu_runtime, params="bf16")
    tokens = torch.randint(1, 2000, (4, 512), device="cuda")
    left = []
    for _ in range(2):  # the first one compiles, and makes workspaces
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = model(tokens, tokens).sum()
        loss.backward()
        model.zero_grad()
        left.append(torch.cuda.memory_allocated() - before)
        most = torch.cuda.max_memory_allocated() - before
        del loss
    assert left[1] < 0.01 * most, f"{left[1] / 2**20:.1f} MiB of {most / 2**20:.1f} are left"
