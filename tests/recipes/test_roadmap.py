"""Rows of the design roadmap, of the ablations, and the baselines: sizes against each other and the paper."""

from itertools import pairwise

import pytest

from hymba_train.config import compose, group_options, recipes_directory
from hymba_train.describe import cache_bytes, model_tensors, resolve_stack
from hymba_train.plan import make_plan
from tests.recipes.rows import ROADMAP, ROWS

ALL = [(row, size) for size, rows in ROWS.items() for row in rows]


def model_of(row, size):
    return compose([f"model={row}_{size}"]).model


def num_parameters(row, size):
    return sum(tensor.num_parameters for tensor in model_tensors(model_of(row, size)))


def test_every_recipe_of_these_sizes_is_in_the_lists():
    found = {name for name in group_options(recipes_directory())["model"] if name.endswith(tuple(ROWS))}
    assert found == {f"{row}_{size}" for row, size in ALL}


@pytest.mark.parametrize(("row", "size"), ALL, ids=[f"{row}_{size}" for row, size in ALL])
def test_a_recipe_is_named_after_itself(row, size):
    assert model_of(row, size).name == f"{row}_{size}"


@pytest.mark.parametrize("layout", ["single", "tp2", "pp2"])
@pytest.mark.parametrize(("row", "size"), ALL, ids=[f"{row}_{size}" for row, size in ALL])
def test_a_row_passes_the_checks_of_the_gpu_kernels(row, size, layout):
    overrides = [f"model={row}_{size}", f"parallel={layout}", "precision=bf16", "run.device=cuda"]
    make_plan(compose(overrides), check_paths=False)


@pytest.mark.parametrize("size", ROWS)
def test_parameters_match_within_a_comparison(size):
    counts = {row: num_parameters(row, size) for row in ROWS[size]}
    assert max(counts.values()) <= 1.03 * min(counts.values()), counts


@pytest.mark.parametrize(("size", "about"), [("20m", 20e6), ("300m", 300e6), ("1b", 1e9)])
def test_sizes_are_what_they_are_called(size, about):
    assert num_parameters("hymba", size) == pytest.approx(about, rel=0.06)


TABLE_10 = {
    "mamba": 1.87, "parallel_4heads": 99.09, "parallel_8heads": 197.39, "parallel_16heads": 394.00, "parallel": 148.24,
    "transformer": 414.72, "all_local": 5.51, "local_global": 41.19, "kv_sharing": 39.42,
    "transformer_kv_compressed": 28.98, "concat": 39.42, "mamba_meta": 1.87, "hymba": 40.01,
}  # fmt: skip
"""MB of cache at 8,000 tokens, as printed (hymba-architecture 6.4)."""


@pytest.mark.parametrize(("row", "printed"), TABLE_10.items(), ids=TABLE_10)
def test_caches_of_the_ablations_as_printed(row, printed):
    assert round(cache_bytes(model_of(row, "300m"), 8000, "paper").total_bytes / 1e6, 2) == printed


def test_cache_of_the_sequential_hybrid_as_printed():
    """Table 1 alone has this row."""
    assert round(cache_bytes(model_of("sequential", "300m"), 8000, "paper").total_bytes / 1e6, 1) == 156.3


@pytest.mark.parametrize("size", ROWS)
def test_what_changes_from_row_to_row(size):
    """The roadmap: each step is the one that the paper names, and the widths that keep parameters equal."""
    models = {row: model_of(row, size) for row in ROADMAP}
    changed = {
        (before, after): {key for key, value in vars(models[after]).items() if value != vars(models[before])[key]}
        - {"name", "ffn_hidden_size"}
        for before, after in pairwise(ROADMAP)
    }
    assert changed["parallel", "local_global"] == {"window_size", "global_layers"}
    assert changed["local_global", "kv_sharing"] == {"kv_groups"}
    assert changed["kv_sharing", "hymba"] == {"num_meta_tokens"}
    assert {"layer_pattern"} <= changed["transformer", "mamba"] & changed["mamba", "sequential"]
    mixers = {row: {layer.mixer for layer in resolve_stack(model)} for row, model in models.items()}
    assert mixers == {
        "transformer": {"attention"}, "mamba": {"ssm"}, "sequential": {"ssm", "attention"}, "parallel": {"hybrid"},
        "local_global": {"hybrid"}, "kv_sharing": {"hybrid"}, "hymba": {"hybrid"},
    }  # fmt: skip


def test_samba_is_mamba_ffn_attention_ffn_with_local_attention():
    layers = resolve_stack(model_of("samba", "300m"))
    assert [layer.mixer for layer in layers] == ["ssm", "attention"] * 6
    assert all(layer.has_ffn for layer in layers)
    assert {layer.window for layer in layers} == {256}


@pytest.mark.parametrize(("experiment", "size"), [("compare_300m", "300m"), ("compare_1b", "1b")])
def test_comparisons_follow_the_paper(experiment, size):
    """Appendix A.3: 100B tokens, sequences of 1K, peak rate 5e-4, cosine; window 256."""
    config = compose([f"experiment={experiment}", f"model=samba_{size}"])
    (phase,) = config.data.phases.values()
    assert (phase.tokens, phase.seq_length, config.optim.lr) == (100_000_000_000, 1024, 5e-4)
    assert (config.schedule.lr_decay_style, config.model.window_size) == ("cosine", 256)
    assert config.run.name == f"{experiment}/samba_{size}"
