import pytest

from hymba_train.config.nearest import did_you_mean, nearest

KNOWN = ["optim.lr", "optim.min_lr", "model.num_layers", "model.hidden_size", "model.ffn_hidden_size"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("model.hiden_size", "model.hidden_size"),
        ("lr", "optim.lr"),
        ("optimizer.lr", "optim.lr"),
        ("num_layers", "model.num_layers"),
        ("model.numlayers", "model.num_layers"),
        ("zzz", None),
    ],
)
def test_nearest(word, expected):
    assert nearest(word, KNOWN) == expected


def test_all_are_listed_when_none_is_near():
    assert did_you_mean("zzz", ["a", "b"]) == "known: a, b"
    assert did_you_mean("zzz", []) == "known: none"
