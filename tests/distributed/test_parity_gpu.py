"""Every layout of two GPUs trains as one GPU does, over NCCL.

What rounding alone makes of a training is measured, not guessed: the same one with every sum in another order (one
micro-batch of four instead of four of one, plain attention instead of fused kernels). A layout may be as far from the
control as :data:`SLACK` times that, for it rounds in other places again.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.distributed.cases import LAYOUTS, REORDERED, control_of
from tests.distributed.conftest import torchrun

pytestmark = [pytest.mark.multigpu, pytest.mark.distributed, pytest.mark.timeout(900)]

SLACK = 4
MODELS = {"demo": 1e-4, "wide": 2e-2}
"""Model (float32; bf16 and Transformer Engine) -> relative difference of losses that rounding must stay below."""
SINGLES = [x for x in [*LAYOUTS, *REORDERED] if x.world_size == 1]
PAIRS = [x for x in LAYOUTS if x.world_size == 2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(model, name of a layout) -> what tests.distributed.worker wrote."""
    out = tmp_path_factory.mktemp("layouts")

    def run(size: int, layouts: list) -> None:
        names = [f"{model}/{layout.name}" for model in MODELS for layout in layouts]
        done = torchrun(size, "tests.distributed.worker", "cuda", str(out), *names, timeout_seconds=600, on_gpus=True)
        print(done.stdout)

    with ThreadPoolExecutor() as pool:  # compiling takes longer than training
        list(pool.map(run, (1, 2), (SINGLES, PAIRS)))
    return lambda model, name: torch.load(out / f"{model}-{name}.pt", weights_only=True)


@pytest.fixture(params=[(m, x) for m in MODELS for x in PAIRS], ids=lambda p: f"{p[0]}-{p[1].name}")
def three(request, trained):
    """Results of the control, of its reordered twin, and of the layout; and the model's name."""
    model, layout = request.param
    control = control_of(layout)
    return trained(model, control), trained(model, f"{control}_reordered"), trained(model, layout.name), model


def apart(a: list[float], b: list[float]) -> float:
    """Largest relative difference."""
    return max(abs(x / y - 1) for x, y in zip(a, b, strict=True))


def test_losses_and_norms_equal_one_gpus(three):
    control, reordered, layout, model = three
    rounding = {key: apart(reordered[key], control[key]) for key in ("losses", "norms", "held_out")}
    found = {key: apart(layout[key], control[key]) for key in rounding}
    print(f"rounding {rounding}\n  layout {found}")
    assert rounding["losses"] < MODELS[model]
    floor = 1e-5 if model == "demo" else 2**-9
    assert all(found[key] <= max(floor, SLACK * rounding[key]) for key in found), (found, rounding)


def test_parameters_equal_one_gpus(three):
    """Each tensor: the norm of its difference after ten steps."""
    control, reordered, layout, _ = three
    assert layout["parameters"].keys() == control["parameters"].keys()
    ratios = {}
    for name, expected in control["parameters"].items():
        expected = expected.float()
        rounding, found = (float((x["parameters"][name].float() - expected).norm()) for x in (reordered, layout))
        ratios[name] = found / max(rounding, 1e-6 * float(expected.norm()))
    worst = max(ratios, key=ratios.__getitem__)
    print(f"furthest apart: {worst}, {ratios[worst]:.2f} times as far as by rounding")
    assert ratios[worst] <= SLACK, {name: ratio for name, ratio in ratios.items() if ratio > SLACK}


def test_padding_is_zero_and_copies_are_equal(three):
    assert three[2]["faults"] == []


@pytest.mark.parametrize("model", MODELS)
def test_one_gpu_learns(model, trained):
    losses = trained(model, "single")["losses"]
    assert losses[-1] < losses[0] - 0.05
