"""The lists of saved tensors against what autograd saves, for the backends that need a GPU."""

import pytest

from tests.describe.test_saved_activations import BF16, BIG, case, compare, measure

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
