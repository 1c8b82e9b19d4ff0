"""The shipped model against the numbers of the published code."""

import pytest
import torch

from hymba_train.hf.modeling_hymba import HymbaForCausalLM
from tests import golden_data
from tests.hf_names import from_hf_state_dict


@pytest.fixture(params=golden_data.cases(), scope="module")
def golden(request):
    """(case, model in evaluation mode)"""
    case = golden_data.load(request.param)
    return case, HymbaForCausalLM.from_pretrained(golden_data.directory(case.name)).eval()


def generate(model, prompt, **settings):
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None,
        output_logits=True, return_dict_in_generate=True, **settings,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


def test_nothing_is_missing_or_left_over_when_loading():
    path = golden_data.directory("a_pair_triple_ntk")
    _, info = HymbaForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values())


def test_logits_and_loss(golden):
    case, model = golden
    with torch.no_grad():
        out = model(case.tensors["input_ids"], labels=case.tensors["labels"])
    assert (out.logits - case.tensors["logits"]).abs().max() <= case.tolerance["logits_max_abs"]
    assert abs(out.loss - case.tensors["loss"]) <= case.tolerance["loss_abs"]


def test_hidden_states(golden):
    case, model = golden
    m = case.config.num_meta_tokens
    with torch.no_grad():
        states = model(case.tensors["input_ids"], output_hidden_states=True).hidden_states
    for layer in range(3):
        error = (states[layer + 1] - case.tensors[f"hidden.layer{layer}"][:, m:]).abs().max()
        assert error <= case.tolerance["hidden_max_abs"][f"layer{layer}"]
    error = (states[-1] - case.tensors["hidden.final_norm"][:, m:]).abs().max()
    assert error <= case.tolerance["hidden_max_abs"]["final_norm"]


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "checkpointed reentrant"])
def test_gradients(golden, checkpointing):
    case, model = golden
    model.zero_grad()
    if checkpointing is not None:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    embeddings = model.get_input_embeddings()(case.tensors["input_ids"])
    embeddings.retain_grad()
    model(inputs_embeds=embeddings, labels=case.tensors["labels"]).loss.backward()
    model.eval().gradient_checkpointing_disable()
    published = {name: p.grad for name, p in model.named_parameters()}
    gradients = from_hf_state_dict(case.config, published)
    name = "embedding.word_embeddings.weight"
    gradients[name] = golden_data.without_pad_lookup(
        gradients[name], case.tensors["input_ids"], embeddings.grad, case.pad_id
    )
    case.check_gradients(gradients)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_equals_full_passes(golden, use_cache):
    case, model = golden
    ids, logits = generate(model, case.tensors["gen.prompt_ids"], use_cache=use_cache)
    assert torch.equal(ids, case.tensors["gen.full.ids"])
    assert (logits - case.tensors["gen.full.step_logits"]).abs().max() <= case.tolerance["logits_max_abs"]


def test_greedy_generation_with_the_published_window(golden):
    case, model = golden
    model.config.decode_window = "published"
    try:
        ids, logits = generate(model, case.tensors["gen.prompt_ids"], use_cache=True)
    finally:
        model.config.decode_window = "training"
    assert torch.equal(ids, case.tensors["gen.cached.ids"])
    assert (logits - case.tensors["gen.cached.step_logits"]).abs().max() <= case.tolerance["logits_max_abs"]


def test_padded_rows_equal_unpadded_ones():
    case = golden_data.load("c_mqa_padded")
    model = HymbaForCausalLM.from_pretrained(golden_data.directory(case.name)).eval()
    ids, mask, labels = (case.tensors[f"padded.{k}"] for k in ("input_ids", "attention_mask", "labels"))
    assert not mask.all()
    with torch.no_grad():
        out = model(ids, attention_mask=mask, labels=labels)
        total, count = 0.0, 0
        for row in range(len(ids)):
            real = mask[row].bool()
            alone = model(ids[row : row + 1, real], labels=labels[row : row + 1, real])
            assert (out.logits[row, real] - alone.logits[0]).abs().max() <= 1e-4
            predicted = (labels[row, real][1:] != -100).sum()
            total, count = total + alone.loss * predicted, count + predicted
    assert abs(out.loss - total / count) <= 1e-5
