"""Planted branches are found important, planted heads alike."""

from __future__ import annotations

import pytest
import torch

from hymba_train.analyze.importance import importance, layer_0, removed, score_losses, to_json
from hymba_train.analyze.kv import analyse, collect
from hymba_train.analyze.similarity import linear_cka, mean_cosine
from hymba_train.errors import UserError
from tests.hf_models import SMALL, make_model


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, SMALL["vocab_size"], (3, 18), generator=generator)
    return {"a": list(rows), "b": [rows[0][:7], rows[1]]}


@pytest.mark.parametrize("planted", [(2, "attention"), (4, "ssm"), (0, "ssm")])
def test_a_planted_branch_is_the_important_one(texts, planted):
    """Every branch but one adds nothing to begin with."""
    model = make_model(dtype=torch.float32)
    norms = {"attention": "pre_avg_layernorm1", "ssm": "pre_avg_layernorm2"}
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            for branch, norm in norms.items():
                if (i, branch) != planted:
                    getattr(layer.mamba, norm).weight.zero_()
    rows = texts["a"]
    with torch.no_grad():  # what the model itself would say
        said = model.generate(torch.stack(rows)[:, :2], max_new_tokens=16, min_new_tokens=16, do_sample=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = importance(model, score_losses({"a": list(said), "b": [said[0][:7], said[1]]}, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert set(found.base) == {"loss/a", "loss/b"} and len(found.without) == 12 and not found.left_out
    for key in found.without:
        for name in found.base:
            assert (found.change(*key, name) != 0) is (key == planted)
    for name in found.base:
        assert found.harm(*planted, name) > 0
        assert layer_0(found)[name]["rank"] == (1 if planted == (0, "ssm") else 2)
    assert to_json(found)["mean_change"][planted[1]]["loss/a"] == pytest.approx(found.change(*planted, "loss/a") / 6)


def test_the_losses_are_the_models_own(texts):
    model = make_model(dtype=torch.float64)
    found = score_losses(texts, 2)(model)
    with torch.no_grad():
        losses = [float(model(row[None], labels=row[None]).loss) for row in texts["b"]]
        assert found["loss/a"] == pytest.approx(
            float(model(torch.stack(texts["a"]), labels=torch.stack(texts["a"])).loss)
        )
    assert found["loss/b"] == pytest.approx((losses[0] * 6 + losses[1] * 17) / 23)


def test_a_removed_branch_leaves_the_half_of_the_other():
    mixer = make_model().model.layers[1].mamba
    attention, ssm = torch.randn(2, 5, 64, dtype=torch.float64)
    with removed(mixer, "attention"):
        assert torch.allclose(mixer._fuse(attention, ssm), mixer.out_proj(mixer.pre_avg_layernorm2(ssm) / 2))


def test_a_score_that_fails_leaves_the_model_as_it_was():
    model, calls = make_model(), []

    def score(model):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("broken")
        return {"loss/x": 0.0}

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        importance(model, score)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_with_one_branch_are_left_out_with_the_reason(texts):
    found = importance(make_model(layer_type=list("hmahhh"), kv_reuse_group=[]), score_losses(texts, 4))
    assert set(found.left_out) == {(1, "attention"), (1, "ssm"), (2, "attention"), (2, "ssm")}
    assert len(found.without) == 8 and set(found.left_out.values()) == {"the layer has one branch alone"}
    with pytest.raises(UserError, match="no layer of this model has attention and an SSM side by side"):
        importance(make_model(layer_type=list("mmmmmm"), kv_reuse_group=[]), score_losses(texts, 4))


def test_harm_of_an_accuracy_is_its_fall():
    model = make_model()
    full = [layer.mamba.pre_avg_layernorm2.weight.abs().sum() for layer in model.model.layers]

    def score(model):
        whole = all(
            layer.mamba.pre_avg_layernorm2.weight.abs().sum() == size
            for layer, size in zip(model.model.layers, full, strict=True)
        )
        return {"piqa": 0.8 if whole else 0.5}

    found = importance(model, score)
    assert found.harm(3, "ssm", "piqa") == pytest.approx(0.3) and found.harm(3, "attention", "piqa") == 0
    assert layer_0(found)["piqa"] == {"change": pytest.approx(-0.3), "rank": 1, "of": 12}


def test_cka_and_cosine():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator)
    turned = x @ torch.linalg.qr(torch.randn(5, 5, generator=generator))[0] * 3 + 7
    other = torch.randn(200, 5, generator=generator)
    assert linear_cka(x, turned) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x, other) < 0.1 and linear_cka(x, torch.ones(200, 3)) == 0
    assert mean_cosine(x, 2 * x) == pytest.approx(1) and mean_cosine(x, -x) == pytest.approx(-1)
    # by hand: one feature each, so CKA is the squared correlation
    a, b = torch.tensor([[1.0], [2], [3]]), torch.tensor([[1.0], [3], [2]])
    assert linear_cka(a, b) == pytest.approx(0.25)


def test_a_planted_duplicate_head_has_similarity_one(texts):
    model = make_model()
    with torch.no_grad():  # rows of in_proj: q 32, k 2 x 8, v 2 x 16
        weight = model.model.layers[4].mamba.in_proj.weight
        weight[40:48] = weight[32:40]
        weight[64:80] = weight[48:64]
    results = analyse(collect(model, texts, 1000))
    assert results["layers"] == [0, 1, 4, 5]
    for kind in ("keys", "values"):
        for layer, found in results[kind]["heads"].items():
            duplicate = layer == 4
            assert (found["mean_cka"] > 1 - 1e-9) is duplicate and (found["mean_cosine"] > 1 - 1e-9) is duplicate
            assert found["cka"].shape == (2, 2) and torch.equal(found["cka"], found["cka"].T)
        assert results[kind]["layers_cka"].shape == (4, 4)
        assert [x["layers"] for x in results[kind]["neighbours"]] == [[0, 1], [1, 4], [4, 5]]


def test_tokens_are_shared_out_and_meta_tokens_left_out(texts):
    features = collect(make_model(), texts, 40)
    assert features[0]["keys"].shape == (20 + 20, 2, 8) and features[0]["values"].shape == (40, 2, 16)


def test_one_head_and_no_attention(texts):
    one = analyse(collect(make_model(num_key_value_heads=1), texts, 50))
    assert one["keys"]["heads"][0]["mean_cka"] is None
    with pytest.raises(UserError, match="has no attention"):
        collect(make_model(layer_type=list("mmmmmm"), kv_reuse_group=[]), texts, 50)
