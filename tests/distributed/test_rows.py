"""Every row of the comparisons, made small, trains under tensor and pipeline parallelism as one process does."""

import pytest
import torch

from tests.distributed.cases import LAYOUTS
from tests.recipes.rows import ROWS
from tests.warm import server

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(3600)]

BY_NAME = {layout.name: layout for layout in LAYOUTS}
WANTED = ("single", "single_documents", "tp2", "tp2_sp_documents", "pp2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(row, layout) -> result; one launch a world size."""
    out, launched = tmp_path_factory.mktemp("rows"), set()

    def get(row: str, name: str) -> dict:
        size = BY_NAME[name].world_size
        if size not in launched:
            launched.add(size)
            layouts = [x for x in WANTED if BY_NAME[x].world_size == size]
            wanted = [f"row_{row}/{layout}" for row in ROWS["20m"] for layout in layouts]
            server().run(size, "tests.distributed.worker", "cpu", str(out), *wanted, timeout_seconds=3000)
        return torch.load(out / f"row_{row}-{name}.pt", weights_only=True)

    return get


@pytest.mark.parametrize("layout", [name for name in WANTED if BY_NAME[name].world_size > 1])
@pytest.mark.parametrize("row", ROWS["20m"])
def test_equals_single_process(row, layout, trained):
    documents = BY_NAME[layout].document_mask
    single, parallel = trained(row, "single_documents" if documents else "single"), trained(row, layout)
    assert parallel["losses"] == pytest.approx(single["losses"], rel=1e-5)
    assert parallel["norms"] == pytest.approx(single["norms"], rel=1e-5)
    assert parallel["held_out"] == pytest.approx(single["held_out"], rel=1e-5)
    assert parallel["faults"] == []
    for name, expected in single["parameters"].items():
        torch.testing.assert_close(
            parallel["parameters"][name], expected, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("row", ROWS["20m"])
def test_learns(row, trained):
    losses = trained(row, "single")["losses"]
    assert losses[-1] < losses[0] - 0.05
