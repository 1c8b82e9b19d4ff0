"""Rows of attention against the model that they are read from, and against sums by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hymba_train.analyze import rows as rows_of
from hymba_train.analyze.attention import BRANCHES, Maps, analyse, collect
from hymba_train.analyze.head_stats import CATEGORIES, HeadStats, receptive_field, total_variation
from hymba_train.analyze.record import recording, without_meta_tokens
from hymba_train.analyze.rows import attention_rows, blocks, implied_rows, normalised, spread_channels
from hymba_train.hf.modeling_hymba import scan
from tests.hf_models import SMALL, make_model

LENGTH, META = 20, SMALL["num_memory_tokens"]  # longer than the window of 6 and the meta tokens


@pytest.fixture(scope="module")
def model():
    return make_model().requires_grad_(False)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, SMALL["vocab_size"], (LENGTH,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def inputs(model, ids):
    """What every layer computes, and what its attention and scan put out."""
    attention, scans, outputs = {}, {}, {}
    hooks = []
    for layer in model.model.layers:
        mixer = layer.mamba
        hooks.append(mixer.pre_avg_layernorm1.register_forward_pre_hook(
            lambda _, x, i=mixer.layer_idx: outputs.__setitem__(i, x[0])
        ))  # fmt: skip
    with recording(model, lambda x: attention.__setitem__(x.layer, x), lambda x: scans.__setitem__(x.layer, x)):
        model(ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return attention, scans, outputs


def test_every_layer_is_heard_once_and_the_model_is_left_alone(model, inputs):
    attention, scans, _ = inputs
    assert list(attention) == list(scans) == list(range(6))
    assert [x.computes_keys for x in attention.values()] == [True, True, False, False, True, True]
    assert [x.window for x in attention.values()] == [None, 6, 6, 6, 6, None]
    assert not any(name in layer.mamba.__dict__ for layer in model.model.layers for name in ("_attend", "_scan"))


@pytest.mark.parametrize("layer", range(6))
def test_attention_rows_times_values_are_what_the_model_computes(inputs, layer):
    attention, _, outputs = inputs
    x = attention[layer]
    rows = torch.cat([attention_rows(x, slice(i, min(i + 7, META + LENGTH))) for i in range(0, META + LENGTH, 7)], 1)
    assert torch.allclose(rows.sum(-1), torch.ones(()).double(), atol=1e-14)
    heads = rows.unflatten(0, (x.keys.shape[0], -1)) @ x.values[:, None]
    assert torch.allclose(heads.flatten(0, 1).transpose(0, 1).flatten(1), outputs[layer], atol=1e-12)


def test_keys_before_rope_are_those_of_the_projection(model, inputs):
    x, mixer = inputs[0][1], model.model.layers[1].mamba
    seen = []
    hook = mixer.in_proj.register_forward_hook(lambda _, __, out: seen.append(out))
    ids = torch.zeros(1, 9, dtype=torch.int64)
    found = []
    with recording(model, lambda x: found.append(x)):
        model(ids, use_cache=False)
    hook.remove()
    projected = seen[0][:, 32:48].unflatten(1, (2, 8)).transpose(0, 1)
    assert torch.allclose(found[1].plain_keys, projected, atol=1e-6)  # angles are float32
    assert not torch.allclose(x.keys, x.plain_keys, atol=1e-3)


@pytest.mark.parametrize("layer", range(6))
def test_implied_attention_times_its_inputs_is_the_scan(inputs, layer):
    x = inputs[1][layer]
    (num_tokens, num_channels), num_states = x.u.shape, x.A.shape[1]
    y, _ = scan(
        x.delta[None], (x.delta * x.u)[None], x.A, x.B[None], x.C[None], x.A.new_zeros(1, num_channels, num_states)
    )
    channels = torch.tensor([0, 5, num_channels - 1])
    alpha = torch.cat([implied_rows(x, slice(i, min(i + 9, num_tokens)), channels) for i in range(0, num_tokens, 9)], 1)
    assert x.u.dtype == alpha.dtype == torch.float64
    assert torch.allclose(
        torch.einsum("cqt,tc->qc", alpha, x.u[:, channels]), y[0][:, channels], rtol=1e-12, atol=1e-13
    )
    assert (alpha.triu(1) == 0).all() and (alpha < 0).any()
    shares = normalised(alpha)
    assert torch.allclose(shares.sum(-1), torch.ones(()).double()) and (shares >= 0).all()


def test_implied_attention_of_equation_2_by_hand(inputs):
    x, i, j, c = inputs[1][2], 11, 4, 3
    decay = torch.ones(4).double()
    for k in range(j + 1, i + 1):
        decay *= torch.exp(x.A[c] * x.delta[k, c])
    expected = (x.C[i] * decay * x.B[j]).sum() * x.delta[j, c]
    assert float(implied_rows(x, slice(i, i + 1), torch.tensor([c]))[0, 0, j]) == pytest.approx(
        float(expected), rel=1e-12
    )


def test_blocks_cover_all_rows_and_stay_small(monkeypatch):
    monkeypatch.setattr(rows_of, "CPU_BLOCK", 100)
    found = blocks(4, 10, torch.device("cpu"))
    assert [i for block in found for i in range(10)[block]] == list(range(10))
    assert max(block.stop - block.start for block in found) == 2
    assert spread_channels(8, 4).tolist() == [0, 2, 4, 6] and spread_channels(3, 9).tolist() == [0, 1, 2]


def planted(rows: list[list[float]], num_meta: int) -> HeadStats:
    stats, first = HeadStats(), 0
    matrix = torch.tensor([rows], dtype=torch.float64)
    for size in (2, matrix.shape[1] - 2):  # in two blocks
        stats.add(matrix[:, first : first + size], first, num_meta)
        first += size
    return stats


def test_masses_entropy_and_reach_by_hand():
    """One meta token and three text tokens."""
    stats = planted([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.1, 0.2, 0.3, 0.4]], 1)
    masses = {name: float(stats.mean(name)) for name in CATEGORIES}
    assert masses == pytest.approx({"meta": 0.8 / 3, "bos": 1.0 / 3, "self": 0.9 / 3, "cross": 0.3 / 3})
    entropy = -sum(p * math.log(p) for p in (0.5, 0.5, 0.2, 0.3, 0.5, 0.1, 0.2, 0.3, 0.4)) / 3
    assert float(stats.mean("entropy")) == pytest.approx(entropy)
    text = -sum(p * math.log(p) for p in (0.3 / 0.8, 0.5 / 0.8, 0.2 / 0.9, 0.3 / 0.9, 0.4 / 0.9)) / 3
    assert float(stats.mean("entropy_text")) == pytest.approx(text)
    assert float(stats.mean("distance")) == pytest.approx(0.1 * 3 + 0.2 * 2 + 0.3)
    assert float(stats.mean("distance_text")) == pytest.approx((0.2 * 2 + 0.3) / 0.9)
    assert stats.mean("meta_columns").tolist() == [[pytest.approx(0.8 / 3)]]


def test_receptive_field_is_equation_5():
    """Two layers of one head: the first looks 3 tokens back, the second 9; N = 2."""
    by_hand = 2 * 3 * (2 - 1 + 1) / (1 * 2 * 3) + 2 * 9 * (2 - 2 + 1) / (1 * 2 * 3)
    assert receptive_field([3, 9]) == pytest.approx(by_hand) == pytest.approx(5)
    assert receptive_field([7, 7, 7]) == pytest.approx(7)


def test_distance_between_domains():
    found = total_variation(torch.tensor([[1.0, 1, 0], [0, 2, 0], [3, 0, 0]]))
    assert found.tolist() == [[0, 0.5, 0.5], [0.5, 0, 1], [0.5, 1, 0]]


def test_masses_of_a_model_sum_to_one_with_both_branches_and_without_meta_tokens(model, ids):
    stats = collect(model, [ids, ids[:9]], num_channels=5)
    with without_meta_tokens(model):
        bare = collect(model, [ids], num_channels=5)
    assert model.config.num_memory_tokens == META
    for branch in BRANCHES:
        for found, meta in ((stats, True), (bare, False)):
            assert list(found[branch]) == list(range(6))
            for stat in found[branch].values():
                total = sum(stat.mean(name) for name in CATEGORIES)
                assert torch.allclose(total, torch.ones_like(total)) and len(total) == (
                    4 if branch == "attention" else 5
                )
                assert bool((stat.mean("meta") > 0).all()) is meta
    assert stats["attention"][0].num_queries == LENGTH + 9 and stats["attention"][0].num_sequences == 2


def test_text_alone_without_meta_tokens_is_what_a_model_without_any_computes(ids):
    """Dropping the meta tokens of a model equals a model that never had them."""
    with_meta, bare = make_model(), make_model(num_memory_tokens=0)
    bare.load_state_dict(with_meta.state_dict(), strict=False)
    with without_meta_tokens(with_meta):
        a = collect(with_meta, [ids], 4)
    b = collect(bare, [ids], 4)
    for branch in BRANCHES:
        for layer in range(6):
            assert torch.allclose(a[branch][layer].mean("entropy"), b[branch][layer].mean("entropy"), atol=1e-6)


def test_maps_and_reasons(ids):
    maps = Maps([0, 2], [1, 3])
    results, left_out = analyse(make_model(layer_type=list("hmahha"), kv_reuse_group=[]), {"text": [ids]}, 4, maps)
    assert results["domains"]["text"]["attention"]["layers"] == [0, 2, 3, 4, 5]
    assert results["domains"]["text"]["ssm"]["layers"] == [0, 1, 3, 4] and left_out == {}
    assert maps.attention[2].shape == (2, META + LENGTH, META + LENGTH) and list(maps.ssm) == [0]
    assert torch.allclose(maps.ssm[0].sum(-1), torch.ones(()), atol=1e-5)
    results, left_out = analyse(
        make_model(layer_type=list("aaaaaa"), num_memory_tokens=0), {"text": [ids]}, 4, Maps([0], [0])
    )
    assert list(results["domains"]["text"]) == ["attention"] and "meta_tokens" not in results
    assert left_out == {"ssm": "the model has no such branch", "meta tokens": "the model has none"}
