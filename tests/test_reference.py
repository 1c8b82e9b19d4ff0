"""The oracle against the numbers of the published code, and against itself where that has no say."""

import dataclasses
import inspect

import pytest
import torch

from hymba_train import oracle
from hymba_train.config.schema import ModelConfig
from hymba_train.describe import model_tensors, resolve_stack
from hymba_train.oracle import OracleHymba
from tests import golden_data
from tests.hf_names import from_hf_state_dict, to_hf_state_dict


def build(case, dtype=torch.float32):
    model = OracleHymba(case.config).to(dtype)
    model.load_state_dict(case.weights)
    return model


def run(model, tokens, labels=None):
    """Forward and, with labels, backward; gradients by our names, the embedding's as padding_idx makes it."""
    output = model(tokens, None if labels is None else golden_data.shifted(labels))
    if labels is None:
        return output, {}
    output.embeddings.retain_grad()
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    name, num_meta = "embedding.word_embeddings.weight", model.config.num_meta_tokens
    gradients[name] = golden_data.without_pad_lookup(gradients[name], tokens, output.embeddings.grad[:, num_meta:], 0)
    return output, gradients


@pytest.fixture(params=golden_data.cases(), scope="module")
def golden(request):
    case = golden_data.load(request.param)
    model = build(case)
    output, gradients = run(model, case.tensors["input_ids"], case.tensors["labels"])
    return case, output, gradients


def test_logits_and_loss_equal_published(golden):
    case, output, _ = golden
    error = (output.logits - case.tensors["logits"]).abs().max().item()
    assert error <= case.tolerance["logits_max_abs"]
    assert abs(output.loss.item() - case.tensors["loss"].item()) <= case.tolerance["loss_abs"]


def test_hidden_states_equal_published(golden):
    case, output, _ = golden
    found = {"embed_meta": output.embeddings, "final_norm": output.final_norm}
    found |= {f"layer{i}": h for i, h in enumerate(output.hidden)}
    expected = {name.removeprefix("hidden."): t for name, t in case.tensors.items() if name.startswith("hidden.")}
    assert set(expected) == set(case.tolerance["hidden_max_abs"])
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max().item() <= case.tolerance["hidden_max_abs"][name], name


def test_branches_and_shared_keys_equal_published(golden):
    case, output, _ = golden
    inner = {name: t for name, t in case.tensors.items() if name.startswith("inner.")}
    assert len(inner) == 6
    for name, tensor in inner.items():
        layer, what = name.removeprefix("inner.layer").split(".")
        by_layer = {
            "attn_branch": output.attention, "ssm_branch": output.ssm,
            "shared_key": output.keys, "shared_value": output.values,
        }[what]  # fmt: skip
        found = by_layer[int(layer)]
        if what.startswith("shared"):
            found = found.transpose(1, 2)
        error = (found - tensor).abs().max() / tensor.abs().max()
        assert error <= case.tolerance["inner_max_abs_over_max"], name


def test_gradients_equal_published(golden):
    case, _, gradients = golden
    case.check_gradients(gradients)


@pytest.mark.parametrize("name", golden_data.cases())
def test_greedy_generation_equals_published(name):
    case = golden_data.load(name)
    model = build(case)
    expected = case.tensors["gen.full.ids"]
    ids = case.tensors["gen.prompt_ids"]
    with torch.no_grad():
        for step in case.tensors["gen.full.step_logits"][0]:
            logits = model(ids).logits[:, -1]
            assert (logits[0] - step).abs().max().item() <= case.tolerance["logits_max_abs"]
            ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(ids, expected)


def test_padding_tokens_are_ordinary_tokens_but_for_the_embedding_gradient():
    case = golden_data.load("c_mqa_padded")
    output, gradients = run(build(case), case.tensors["padded.input_ids"], case.tensors["padded.labels"])
    error = (output.logits - case.tensors["padded.logits"]).abs().max().item()
    assert error <= case.tolerance["logits_max_abs"]
    assert abs(output.loss.item() - case.tensors["padded.loss"].item()) <= case.tolerance["loss_abs"]
    case.check_gradients(gradients, prefix="padded.grad.")


MIXED = ModelConfig(
    name="mixed", num_layers=6, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2,
    vocab_size=50, layer_pattern=["hybrid", "attention:no_ffn", "attention", "ssm", "ssm:no_ffn", "hybrid"],
    global_layers=[0, 5], kv_groups=[[1, 2]], window_size=4, num_meta_tokens=3, mamba_state_dim=4,
    rope_type="ntk", max_position_embeddings=64, rope_original_max_positions=16,
)  # fmt: skip


@pytest.mark.parametrize(
    "changes", [{}, {"num_meta_tokens": 0}, {"untie_embeddings_and_output_weights": True}], ids=str
)
def test_parameters_are_those_described(changes):
    config = dataclasses.replace(MIXED, **changes)
    model = OracleHymba(config)
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert found == {t.name: t.shape for t in model_tensors(config)}


@pytest.mark.parametrize("name", golden_data.cases())
def test_published_names_come_back_unchanged(name):
    case = golden_data.load(name)
    back = to_hf_state_dict(case.config, case.weights)
    assert back.keys() == case.hf_weights.keys()
    assert all(torch.equal(back[n], t) for n, t in case.hf_weights.items())
    assert from_hf_state_dict(case.config, back).keys() == {t.name for t in model_tensors(case.config)}


@pytest.mark.parametrize("num_meta_tokens", [0, 2, 3])
def test_packed_documents_equal_documents_alone(num_meta_tokens):
    """Documents of 1, 2, 9 and 8 tokens: shorter than the convolution and longer than the window."""
    torch.manual_seed(1)
    model = perturbed(dataclasses.replace(MIXED, num_meta_tokens=num_meta_tokens))
    lengths = [1, 2, 9, 8]
    tokens = torch.randint(50, (2, sum(lengths)))
    labels = torch.randint(50, tokens.shape)
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).expand(2, -1)
    packed = model(tokens, labels, segments)
    alone = [model(t, y) for t, y in zip(tokens.split(lengths, 1), labels.split(lengths, 1), strict=True)]
    torch.testing.assert_close(packed.logits, torch.cat([o.logits for o in alone], dim=1), rtol=1e-10, atol=1e-10)
    losses = torch.cat([o.token_losses for o in alone], dim=1)
    torch.testing.assert_close(packed.token_losses, losses, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(model(tokens).logits, packed.logits, atol=1e-3)


def test_a_later_token_changes_nothing_before_it():
    torch.manual_seed(2)
    model = perturbed(MIXED)
    tokens = torch.randint(50, (1, 12))
    other = tokens.clone()
    other[0, 8] += 1 if other[0, 8] < 49 else -1
    before, after = model(tokens).logits, model(other).logits
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8:], after[:, 8:])


def test_labels_that_are_not_predicted_have_no_loss():
    torch.manual_seed(3)
    model = perturbed(MIXED)
    tokens, labels = torch.randint(50, (2, 6)), torch.randint(50, (2, 6))
    full = model(tokens, labels)
    labels[0, 2:5] = -100
    output = model(tokens, labels)
    assert torch.equal(output.token_losses[0, 2:5], torch.zeros(3).double())
    rest = full.token_losses.flatten()[labels.flatten() != -100]
    torch.testing.assert_close(output.loss, rest.mean())


def test_only_layers_with_a_branch_report_it():
    output = OracleHymba(MIXED)(torch.zeros(1, 3, dtype=torch.int64))
    layers = resolve_stack(MIXED)
    assert list(output.attention) == [x.index for x in layers if x.has_attention] == [0, 1, 2, 5]
    assert list(output.ssm) == [x.index for x in layers if x.has_ssm] == [0, 3, 4, 5]
    assert list(output.keys) == list(output.values) == [0, 1, 5]


def test_the_oracle_is_independent_and_short():
    source = inspect.getsource(oracle)
    imports = [line for line in source.splitlines() if "import" in line and "hymba_train" in line]
    assert all("hymba_train.config" in line or "hymba_train.describe" in line for line in imports)
    assert len(source.splitlines()) < 400


def perturbed(config):
    """A float64 model with no parameter at a special value."""
    model = OracleHymba(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model
