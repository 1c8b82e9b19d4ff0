"""Blends by name: weights are written once, and phases refer to them."""

import pytest

from hymba_train.config import compose
from hymba_train.config.choices import check_values
from hymba_train.errors import UserError

BLENDS = "data.blends={mixed: {books: 3, code: 1}, prose: {books: 1.0}}"


def test_phases_refer_to_a_blend_by_name():
    config = compose(["experiment=demo", BLENDS, "data.phases.stable.blend=mixed", "data.phases.long.blend=prose"])
    assert config.data.phases["stable"].blend == {"books": 3.0, "code": 1.0}
    assert config.data.phases["long"].blend == {"books": 1.0}
    changed = compose(["experiment=demo", BLENDS, "data.phases.stable.blend=mixed", "data.blends.mixed.code=2"])
    assert changed.data.phases["stable"].blend == {"books": 3.0, "code": 2.0}


def test_the_blend_of_a_recipe():
    phase = "data.phases.main={tokens: 1000000, seq_length: 2048, global_batch_size: 8, blend: web}"
    config = compose(["model=hymba_tiny", "data=fineweb", phase])
    assert config.data.phases["main"].blend == {"fineweb": 0.8, "fineweb_edu": 0.2}


def test_a_phase_may_have_weights_of_its_own():
    blend = compose(["experiment=demo"]).data.phases["stable"].blend
    assert compose(["experiment=demo", BLENDS]).data.phases["stable"].blend == blend


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([BLENDS, "data.phases.long.blend=mixd"], "data.phases.long.blend=mixd: no such blend; did you mean mixed?"),
        (["data.phases.long.blend=mixed"], "data.phases.long.blend=mixed: no such blend; data.blends is empty"),
        ([BLENDS, "data.phases.long.blend=3"], "data.phases.long.blend: expected mapping of names to float; got 3"),
        (["data.blends={mixed: books}"], "data.blends.mixed: expected mapping of names to float"),
    ],
)
def test_wrong_names_and_values_are_one_line(overrides, message):
    with pytest.raises(UserError) as caught:
        compose(["experiment=demo", *overrides])
    (line,) = caught.value.problems
    assert line.startswith(message)


def test_weights_are_checked_in_the_phases_that_use_them():
    (line,) = check_values(compose(["experiment=demo", "data.blends={m: {books: 0}}", "data.phases.long.blend=m"]))
    assert line == "data.phases.long.blend.books=0.0: must be above 0"
