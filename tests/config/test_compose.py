"""Composition: groups, experiments, overrides, a user's own directory, and what is refused."""

import pytest

from hymba_train.config import compose, group_options, recipes_directory
from hymba_train.config.recipes import check_user_directory
from hymba_train.errors import UserError


def problems(overrides, **keywords):
    with pytest.raises(UserError) as caught:
        compose(overrides, **keywords)
    assert all("\n" not in line for line in caught.value.problems)
    return list(caught.value.problems)


def test_experiment_overrides_groups_and_the_command_line_overrides_both():
    demo = compose(["experiment=demo"])
    assert (demo.model.name, demo.precision.params, demo.optim.min_lr) == ("hymba_tiny", "float32", 1e-4)
    changed = compose(["experiment=demo", "precision=bf16", "optim.lr=1e-3", "model=hymba_125m"])
    assert (changed.model.name, changed.precision.params, changed.optim.lr) == ("hymba_125m", "bf16", 1e-3)
    assert changed.optim.min_lr == 1e-4


def test_order_of_overrides_does_not_matter():
    assert compose(["optim.lr=1e-3", "experiment=demo"]) == compose(["experiment=demo", "optim.lr=1e-3"])


def test_keys_that_no_recipe_mentions_can_be_set_without_plus():
    assert compose(["model=hymba_tiny", "model.init_method=published"]).model.init_method == "published"
    assert compose(["model=hymba_tiny", "+model.init_method=published"]).model.init_method == "published"


def test_phases_are_overridden_by_name_and_keep_their_order():
    config = compose(["experiment=pretrain_1p5b", "data.phases.anneal.micro_batch_size=4"])
    assert list(config.data.phases) == ["stable", "anneal", "long"]
    assert [p.micro_batch_size for p in config.data.phases.values()] == [8, 4, 2]


def test_a_phase_can_be_left_out_and_added():
    config = compose(["experiment=demo", "~data.phases.long", "data.phases.more={tokens: 4096, seq_length: 256}"])
    assert list(config.data.phases) == ["stable", "more"]
    assert config.data.phases["more"].global_batch_size == "???"


def test_interpolation_reaches_keys_that_only_the_schema_sets():
    assert compose(["model=hymba_tiny", "run.name=seed${run.seed}"]).run.name == "seed1234"


def test_numbers_are_converted_only_between_int_and_whole_float():
    config = compose(["experiment=demo", "data.phases.stable.tokens=1e12", "optim.clip_grad=1"])
    assert config.data.phases["stable"].tokens == 10**12 and isinstance(config.data.phases["stable"].tokens, int)
    assert isinstance(config.optim.clip_grad, float)


def test_every_problem_is_reported_at_once():
    lines = problems(
        ["experiment=demo", "model.hiden_size=3", "model.num_layers=abc", "data.phases.stable.tokns=1", "run.name=1"]
    )
    assert len(lines) == 4
    assert "model.hiden_size: unknown key; did you mean model.hidden_size?" in lines
    assert "model.num_layers: expected int; got 'abc' (text)" in lines
    assert "data.phases.stable.tokns: unknown key; did you mean data.phases.stable.tokens?" in lines


def test_nothing_is_ever_instantiated(tmp_path):
    marker = tmp_path / "made"
    lines = problems(["experiment=demo", f"data.sources.books={{_target_: pathlib.Path.touch, self: '{marker}'}}"])
    assert lines[0].startswith("data.sources.books._target_: keys that begin with '_' are refused")
    assert problems(["experiment=demo", "data.phases.stable.blend._target_=1"])[0].startswith(
        "data.phases.stable.blend._t"
    )
    assert not marker.exists()


def test_recipes_are_plain_yaml(tmp_path):
    (tmp_path / "experiment").mkdir()
    marker = tmp_path / "made"
    text = f"# @package _global_\nrun:\n  name: !!python/object/apply:os.mkdir ['{marker}']\n"
    (tmp_path / "experiment" / "bad.yaml").write_text(text)
    assert "not plain YAML" in problems(["model=hymba_tiny", "experiment=bad"], config_dir=tmp_path)[0]
    assert not marker.exists()


def test_a_users_directory_adds_experiments(tmp_path):
    directory = tmp_path / "it's mine, all"
    (directory / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /model: hymba_tiny\n  - _self_\nrun: {name: mine}\n"
    (directory / "experiment" / "mine.yaml").write_text(text)
    config = compose(["experiment=mine"], config_dir=directory)
    assert (config.run.name, config.model.name) == ("mine", "hymba_tiny")
    assert problems(["experiment=mine"]) == [
        f"experiment=mine: no such experiment; known: {', '.join(group_options(recipes_directory())['experiment'])}"
    ]


def test_a_users_recipe_cannot_hide_behind_one_of_the_package(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "hymba_tiny.yaml").write_text("num_layers: 3\n")
    with pytest.raises(UserError, match=r"model/hymba_tiny\.yaml is a recipe of the package too"):
        check_user_directory(tmp_path, recipes_directory())


def test_an_experiment_that_asks_for_an_unknown_option_is_named(tmp_path):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /model: hymba_tny\n  - _self_\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    line = problems(["experiment=mine"], config_dir=tmp_path)[0]
    assert line == "experiment/mine.yaml: model=hymba_tny: no such model; did you mean hymba_tiny?"


def test_composing_twice_does_not_share_state():
    first = compose(["experiment=demo"])
    first.data.phases["stable"].blend["books"] = 99.0
    first.model.global_layers.append(5)
    assert compose(["experiment=demo"]).data.phases["stable"].blend["books"] == 0.3
    assert compose(["experiment=demo"]).model.global_layers == [0, 3, 7]


def test_a_value_to_be_given_is_never_replaced_by_a_default(tmp_path):
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "mine.yaml").write_text("lr: ???\n")
    assert compose(["model=hymba_tiny", "optim=mine"], config_dir=tmp_path).optim.lr == "???"
    assert compose(["model=hymba_tiny", "optim.lr=???"]).optim.lr == "???"
