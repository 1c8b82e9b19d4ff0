"""Packed documents do not see one another: in every op backend, and in every layout of tests/data/leak_worker.py."""

import pytest
import torch

from hymba_train.errors import UserError
from hymba_train.model import build_model_chunks
from hymba_train.ops import registry
from hymba_train.ops.registry import BACKENDS, Backend
from tests.data.leak_worker import LAYOUTS
from tests.data.packed_documents import STACKS, alone, config_of, documents, of_unchanged, pack
from tests.warm import server

KEYS = {
    "attention": "attention_backend", "selective_scan": "scan_backend", "ssd_scan": "ssd_backend",
    "causal_conv_rows": "conv_backend",
}  # fmt: skip
STACK = {"ssd_scan": "mamba2"}
"""Op -> the stack that has it; hybrid has the others."""
DTYPES = {torch.float32: "float32", torch.bfloat16: "bf16"}


EVERY_BACKEND = [
    pytest.param(
        op, backend, device, marks=[pytest.mark.gpu] if device == "cuda" else [], id=f"{op}-{backend.name}-{device}"
    )
    for op in KEYS  # the others are row by row
    for backend in BACKENDS[op]
    if "segment_ids" in backend.can  # the others are refused, see below
    for device in sorted(backend.device_types)
]


@pytest.fixture
def make(request):
    """make(stack, device, **precision) -> the model, with parameters away from their initial ones and zeros."""

    def build(stack: str = "hybrid", device: str = "cpu", **precision: str):
        config = config_of(stack)
        config.run.device = device
        runtime = request.getfixturevalue("lone_runtime" if device == "cpu" else "gpu_runtime")
        for key, value in precision.items():
            setattr(config.precision, key, value)
        (model,) = build_model_chunks(config, runtime, [range(config.model.num_layers)])
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.copy_(noise + (0.5 if parameter.dim() == 1 else 0))  # from the CPU: the same on every device
        return model, device

    return build


def losses_and_gradients(made, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss a token [B, S], gradient of their sum by parameter)."""
    model, device = made
    model.zero_grad()
    losses = model(**{key: value.to(device) for key, value in batch.items()})
    losses.sum().backward()
    return losses.detach().cpu(), {name: p.grad.detach().cpu().clone() for name, p in model.named_parameters()}


GRADIENT_TOLERANCE = {"float32": 1e-6, "bf16": 2e-2}
"""Of the largest gradient. Some backward kernels sum in no fixed order, which in bf16 moves last digits; the losses are
held to 1e-6 all the same."""


def assert_no_leak(made, gradient_tolerance: float = GRADIENT_TOLERANCE["float32"]):
    before, after = pack(documents()), pack(documents(changed=True))
    assert not torch.equal(before["tokens"], after["tokens"])
    whole, whole_changed = (losses_and_gradients(made, batch)[0] for batch in (before, after))
    own = of_unchanged(before)["labels"] != -100
    assert (whole - whole_changed)[own].abs().max() <= 1e-6
    assert (whole - whole_changed)[~own].abs().max() > 1e-2, "the changed document itself has other losses"
    (_, expected), (_, found) = (losses_and_gradients(made, of_unchanged(batch)) for batch in (before, after))
    for name, gradient in expected.items():
        difference = (found[name] - gradient).abs().max()
        assert difference <= gradient_tolerance * max(1, gradient.abs().max()), name


def assert_equals_one_by_one(made, loss_tolerance: float = 1e-6):
    """``loss_tolerance``: absolute and relative. A GPU may choose another kernel for another length, which sums in
    another order."""
    losses, gradients = losses_and_gradients(made, pack(documents()))
    sums = {name: torch.zeros_like(gradient, dtype=torch.float64) for name, gradient in gradients.items()}
    for row, row_documents in enumerate(documents()):
        begin = 0
        for document in row_documents:
            if len(document) > 1:
                single, single_gradients = losses_and_gradients(made, alone(document))
                packed = losses[row, begin : begin + len(document) - 1]
                assert torch.allclose(packed, single[0], rtol=loss_tolerance, atol=loss_tolerance)
                for name, gradient in single_gradients.items():
                    sums[name] += gradient
            begin += len(document)
    for name, gradient in gradients.items():
        scale = sums[name].abs().max()
        assert scale > 0 or name.endswith("bias"), f"{name} has no gradient at all"
        assert (gradient - sums[name]).abs().max() <= 1e-5 * max(1, scale), name


def precision_of(op: str, backend: Backend, device: str) -> dict[str, str]:
    """What asks for this backend, in float32 if it has that. Skips, saying why, what this machine cannot run."""
    dtype = next(dtype for dtype in DTYPES if dtype in backend.dtypes)
    if obstacles := backend.obstacles(device, {"segment_ids", "backward"}, dtype):
        pytest.skip(f"{op} {backend.name} {', '.join(obstacles)}")
    return {"params": DTYPES[dtype], KEYS[op]: backend.name}


@pytest.mark.parametrize(("op", "backend", "device"), EVERY_BACKEND)
def test_changing_one_document_changes_no_other(op, backend, device, make):
    precision = precision_of(op, backend, device)
    made = make(STACK.get(op, "hybrid"), device, **precision)
    assert_no_leak(made, GRADIENT_TOLERANCE[precision["params"]])


@pytest.mark.parametrize(("op", "backend", "device"), EVERY_BACKEND)
def test_a_pack_equals_its_documents_one_by_one(op, backend, device, make):
    precision = precision_of(op, backend, device)
    if precision["params"] != "float32":
        pytest.skip(f"{backend.name} has no float32: rounding hides what this test looks for")
    made = make(STACK.get(op, "hybrid"), device, **precision)
    assert_equals_one_by_one(made, 1e-6 if device == "cpu" else 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("stack", STACKS)
def test_nothing_leaks_in_what_trains_on_a_gpu(stack, make):
    """bf16 through Transformer Engine and the backends that auto chooses: rounding is the same on both sides."""
    pytest.importorskip("transformer_engine")
    assert_no_leak(make(stack, "cuda", params="bf16"), GRADIENT_TOLERANCE["bf16"])


@pytest.mark.parametrize("op", KEYS)
def test_a_backend_that_cannot_keep_documents_apart_is_refused(op, make, monkeypatch):
    torch_backend = next(backend for backend in BACKENDS[op] if backend.name == "torch")
    leaky = Backend(op, "leaky", torch_backend.target, torch_backend.device_types, torch_backend.can - {"segment_ids"})
    monkeypatch.setitem(registry.BACKENDS, op, (leaky, *BACKENDS[op]))
    with pytest.raises(UserError, match="backend 'leaky' has no documents kept apart by segment_ids; use 'torch'"):
        make(STACK.get(op, "hybrid"), **{KEYS[op]: "leaky"})


@pytest.mark.parametrize("stack", [stack for stack in STACKS if stack != "hybrid"])
def test_neither_in_any_other_stack(stack, make):
    made = make(stack)
    assert_no_leak(made)
    made[0].double()  # float32 sums over the whole pack and over each document differ in their last digits
    assert_equals_one_by_one(made)


def test_without_the_mask_it_does_leak(make):
    # The test above can fail: the same change moves the losses behind it when documents are not told apart.
    made = make()
    before, after = ({k: pack(documents(changed))[k] for k in ("tokens", "labels")} for changed in (False, True))
    own = of_unchanged(pack(documents()))["labels"] != -100
    difference = losses_and_gradients(made, before)[0] - losses_and_gradients(made, after)[0]
    assert difference[own].abs().max() > 1e-3


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [2, pytest.param(4, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_neither_in_any_layout(tmp_path, num_processes):
    server().run(num_processes, "tests.data.leak_worker", str(tmp_path), timeout_seconds=800)
    assert (tmp_path / "done.txt").read_text().splitlines() == list(LAYOUTS[num_processes])
