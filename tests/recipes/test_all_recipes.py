"""Every recipe composes, is planned, and says where its values come from."""

import pytest
import yaml

from hymba_train.config import compose, group_options, recipes_directory, to_be_given
from hymba_train.config.schema import Config
from hymba_train.config.typed import field_types, schema_keys
from hymba_train.describe import resolve_stack
from hymba_train.plan import make_plan

RECIPES = recipes_directory()
GROUPS = group_options(RECIPES)
EVERY = [(group, option) for group, options in GROUPS.items() for option in options]


def test_groups_are_those_of_the_schema():
    assert set(GROUPS) == (set(field_types(Config)) | {"experiment"}) - {"run"}


@pytest.mark.parametrize(("group", "option"), EVERY, ids=[f"{g}={o}" for g, o in EVERY])
def test_every_option_composes_and_is_planned(group, option):
    base = [] if group in ("experiment", "model") else ["model=hymba_tiny"]
    plan = make_plan(compose([*base, f"{group}={option}"]), check_paths=False)
    assert len(plan.layers) == plan.config.model.num_layers
    if group == "experiment":
        # Whole epochs are as long as the data's packings.
        waiting = {f"data.phases.{name}.tokens" for name, phase in plan.config.data.phases.items() if phase.epochs}
        assert waiting <= set(plan.to_be_given) if waiting else plan.steps.num_steps > 0
        assert all(key.startswith("data.") or key == "checkpoint.load" for key in plan.to_be_given)


@pytest.mark.parametrize("option", GROUPS["parallel"])
@pytest.mark.parametrize("experiment", ["demo", "pretrain_1p5b"])
def test_every_layout_fits_the_experiments(option, experiment):
    overrides = [f"experiment={experiment}", f"parallel={option}"]
    if experiment == "demo" and option in ("dp8", "dp128"):  # batches for a laptop otherwise
        overrides += [
            f"data.phases.{name}.{key}"
            for name in ("stable", "long")
            for key in ("global_batch_size=128", "micro_batch_size=1")
        ]
    plan = make_plan(compose(overrides), check_paths=False)
    assert plan.balance < 1.25


@pytest.mark.parametrize(("group", "option"), EVERY, ids=[f"{g}={o}" for g, o in EVERY])
def test_every_file_explains_itself_and_names_known_keys(group, option):
    text = (RECIPES / group / f"{option}.yaml").read_text()
    comments = [line for line in text.splitlines() if line.startswith("# ") and "@package" not in line]
    assert comments, "a recipe begins with what it is"
    assert max(map(len, text.splitlines())) <= 120
    keys = yaml.safe_load(text.replace("???", "'???'").replace("\"'???'\"", "'???'"))
    if group != "experiment":
        known = {*schema_keys(), "data.sources", "data.phases", "evaluation.recall", f"{group}.defaults"}
        assert {f"{group}.{key}" for key in keys} <= known


@pytest.mark.parametrize(
    ("model", "parameters", "published"),
    [
        ("hymba_1p5b", 1_522_797_824, 1.52e9),
        ("hymba_350m", 353_701_888, 350e6),
        ("hymba_125m", 129_944_064, 125e6),
        ("hymba_tiny", 2_800_064, 2.8e6),
    ],
)
def test_parameter_counts(model, parameters, published):
    plan = make_plan(compose([f"model={model}"]))
    assert plan.num_parameters == parameters == pytest.approx(published, rel=0.04)
    assert f"{parameters:,} parameters" in (RECIPES / "model" / f"{model}.yaml").read_text()


def test_1p5b_is_the_published_configuration():
    """config.json of nvidia/Hymba-1.5B-Base (hymba-architecture 1.1)."""
    m = compose(["model=hymba_1p5b"]).model
    assert (m.num_layers, m.hidden_size, m.ffn_hidden_size, m.vocab_size) == (32, 1600, 5504, 32001)
    assert (m.num_attention_heads, m.num_query_groups, m.window_size, m.num_meta_tokens) == (25, 5, 1024, 128)
    assert (m.mamba_expand, m.mamba_state_dim, m.mamba_conv_width, m.mamba_dt_rank) == (2, 16, 4, 100)
    assert (m.rope_type, m.rotary_base, m.max_position_embeddings, m.rope_original_max_positions) == (
        "ntk", 10_000, 8192, 2048
    )  # fmt: skip
    assert (m.layernorm_epsilon, m.untie_embeddings_and_output_weights, m.init_method_std) == (1e-6, False, 0.02)
    assert m.global_layers == [0, 15, 31]
    assert m.kv_groups[7] == [16, 17, 18] and sorted(len(g) for g in m.kv_groups) == [2] * 13 + [3]


def test_every_published_model_has_every_kind_of_layer():
    for model in ("hymba_tiny", "hymba_125m", "hymba_350m", "hymba_1p5b"):
        layers = resolve_stack(compose([f"model={model}"]).model)
        assert {x.kv_role for x in layers} == {"own", "producer", "consumer"}, model
        assert {len(x.kv_consumers) for x in layers} == {0, 1, 2}, model
        assert [x.index for x in layers if x.span == "global"] == [0, len(layers) // 2 - 1, len(layers) - 1], model


def test_pretraining_follows_the_paper():
    config = compose(["experiment=pretrain_1p5b"])
    assert (config.optim.lr, config.optim.min_lr) == (3e-3, 1e-5)
    s = config.schedule
    assert (s.lr_decay_style, s.lr_warmup_fraction, s.lr_wsd_decay_fraction) == ("wsd", 0.01, 0.2)
    phases = list(config.data.phases.values())
    assert sum(p.tokens for p in phases) == 1_500_000_000_000 and phases[-1].tokens == 100_000_000_000
    assert [(p.seq_length, p.rope_type) for p in phases] == [(2048, "default"), (2048, "default"), (8192, "ntk")]
    assert all(1.9e6 < p.seq_length * p.global_batch_size < 2.2e6 for p in phases)
    assert to_be_given(config) == ["data.tokenizer", "data.sources.dclm.path", "data.sources.smollm.path"]


def test_the_demo_needs_nothing_from_the_user():
    assert to_be_given(compose(["experiment=demo"])) == []


def test_recipes_are_found_beside_the_package_and_in_a_wheel(tmp_path, monkeypatch):
    import hymba_train

    assert (RECIPES / "config.yaml").is_file() and RECIPES.name == "recipes"
    installed = tmp_path / "site" / "hymba_train_recipes"
    installed.mkdir(parents=True)
    (installed / "config.yaml").write_text("")
    monkeypatch.setattr(hymba_train, "__file__", str(tmp_path / "lib" / "hymba_train" / "__init__.py"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert recipes_directory() == installed
