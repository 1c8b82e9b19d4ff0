"""Imported weights train under every layout, and a layout leaves no trace in an export."""

from __future__ import annotations

import pytest

from hymba_train.convert.cli import run_convert
from hymba_train.convert.load import load_model
from hymba_train.convert.to_hf import export_hf
from hymba_train.evaluation.held_out import held_out_losses
from tests.convert.conftest import UNEVEN
from tests.train.test_training import run
from tests.warm import server

pytestmark = pytest.mark.distributed
pytest.importorskip("transformers", reason="transformers is not installed (extra 'hf')")

# world size -> layouts. With learning rate 0 the weights stay what they were, and are saved anew by the layout.
LAYOUTS = {
    2: {"tp2": ["parallel.tensor=2", "parallel.distributed_optimizer=true"], "pp2": ["parallel.pipeline=2"]},
    4: {"tp2_pp2": ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]},
    5: {"tp5": ["parallel.tensor=5", "model.make_vocab_size_divisible_by=4"]},
}


@pytest.fixture(scope="module")
def source(runs, tmp_path_factory):
    """(export of the run that one process trained, import of that)"""
    path = tmp_path_factory.mktemp("layouts")
    exported = export_hf(runs.path("whole"), path / "exported", license_id="some-licence-1.0")
    assert run_convert(["from-hf", "--model", str(exported), "--output", str(path / "imported")]) == 0
    return exported, path / "imported"


@pytest.mark.parametrize("world_size", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 5))])
def test_layouts_train_from_an_import_and_export_the_same_bytes(runs, source, tmp_path, world_size):
    exported, imported = source
    settings = [*UNEVEN, "run.train_steps=1", "optim.lr=0", "optim.min_lr=0", "checkpoint.load_optimizer=false"]
    layouts = LAYOUTS[world_size]
    wanted = [run(name, *settings, *layout, load=str(imported)) for name, layout in layouts.items()]
    first, layout = next(iter(layouts.items()))
    wanted.append(run("after_" + first, *settings, *layout, load=str(runs.path(first))))
    arguments = " then ".join(" ".join(r) for r in wanted).split(" ")
    server().run(world_size, "tests.train.tiny_run", str(runs.directory), *arguments, timeout_seconds=280)
    for name, start in [*((name, "imported") for name in layouts), ("after_" + first, first)]:
        again = export_hf(runs.path(name), tmp_path / name)
        assert (again / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes(), name
        card = (again / "README.md").read_text()
        assert f"- Started from a checkpoint of {start}." in card
        assert card.startswith("---\nlicense: some-licence-1.0\n"), "foreign weights keep their licence"
        assert "- Weights imported from exported, licence there: some-licence-1.0.\n" in card
        loaded = load_model(runs.path(name))
        losses = held_out_losses(loaded.model, loaded.checkpoint.config, loaded.checkpoint.phase)
        logged = runs.held_out(name)
        assert {d: x.loss for d, x in losses.items()} == pytest.approx(logged, abs=1e-5)
