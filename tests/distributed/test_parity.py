"""Every parallel layout trains as one process does: the control for everything (design.md, numbers that must hold)."""

import pytest
import torch

from tests.distributed.cases import LAYOUTS, MODELS, control_of, fits

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

BY_NAME = {layout.name: layout for layout in LAYOUTS}
PARALLEL = [(m, x) for m in MODELS for x in LAYOUTS if x.world_size > 1 and fits(m, x)]


@pytest.fixture(params=PARALLEL, ids=lambda p: f"{p[0]}-{p[1].name}")
def pair(request, trained):
    """(result of the single process, result of the layout)."""
    model, layout = request.param
    return trained(model, BY_NAME[control_of(layout)]), trained(model, layout)


def test_equals_single_process(pair):
    single, parallel = pair
    assert parallel["losses"] == pytest.approx(single["losses"], rel=1e-5)
    assert parallel["norms"] == pytest.approx(single["norms"], rel=1e-5)
    assert parallel["held_out"] == pytest.approx(single["held_out"], rel=1e-5)


def test_recall_tasks_score_as_in_a_single_process(pair):
    """Answers, hits, tokens and losses of every bucket: neither rows that fill up nor shares of ranks count."""
    single, parallel = pair
    assert parallel["recall"] == pytest.approx(single["recall"], rel=1e-5)
    assert single["recall"][:3:2] == [30, 30] and single["recall"][1] > 0, "some answers are hit"


def test_padding_is_zero_and_copies_are_equal(pair):
    assert pair[1]["faults"] == []


def test_parameters_equal_single_process(pair):
    single, parallel = pair
    assert parallel["parameters"].keys() == single["parameters"].keys()
    for name, expected in single["parameters"].items():
        torch.testing.assert_close(
            parallel["parameters"][name], expected, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("model", MODELS)
def test_the_single_process_learns(model, trained):
    losses = trained(model, BY_NAME["single"])["losses"]
    assert losses[-1] < losses[0] - 0.05
