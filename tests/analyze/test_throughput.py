"""Speeds are not asserted: that both models do the work they say, on caches of the size they say."""

from __future__ import annotations

import json
import math

import pytest
import torch

from hymba_train.analyze.llama import llama_config, make_llama
from hymba_train.analyze.runners import HymbaRunner, LlamaRunner, LlamaStep, cache_tensors, hymba_tensors
from hymba_train.analyze.throughput import main, random_hymba
from hymba_train.analyze.timing import halved, measure, ratios
from hymba_train.config import compose
from hymba_train.describe import model_tensors
from hymba_train.errors import UserError
from tests.hf_models import SMALL, make_model


@pytest.fixture(scope="module")
def hymba():
    return make_model(dtype=torch.float32).requires_grad_(False)


@pytest.fixture(scope="module")
def llama(hymba):
    torch.manual_seed(1)
    config = llama_config(hymba.config, hymba.num_parameters(), 2)
    config.initializer_range = 0.3  # so that attention matters
    return make_llama(config, torch.float32, "cpu")


def test_the_opponent_has_the_size_of_the_1p5b():
    """Within 1 %, multi-head and grouped."""
    from transformers import LlamaForCausalLM

    from hymba_train.hf.configuration_hymba import HymbaConfig

    for groups, kv_heads in ((1, 25), (5, 5)):
        config = llama_config(HymbaConfig(), 1_522_797_824, groups)
        assert (config.num_key_value_heads, config.num_hidden_layers, config.hidden_size) == (kv_heads, 32, 1600)
        with torch.device("meta"):
            assert LlamaForCausalLM(config).num_parameters() == pytest.approx(1_522_797_824, rel=0.01)
    with pytest.raises(UserError, match="25 query heads do not divide"):
        llama_config(HymbaConfig(), 1_522_797_824, 4)


@torch.inference_mode()
def test_steps_of_the_llama_continue_its_prompt(llama):
    """Prefill and steps, mask and positions of ours, equal one pass over all tokens."""
    runner, ids = LlamaRunner(llama), torch.randint(0, SMALL["vocab_size"], (2, 9))
    cache = runner.prefill(ids, capacity=16)
    step = LlamaStep(runner, cache, 2, 9, 16)
    for number in range(4):
        token = torch.tensor([[7 + number], [30 - number]])
        ids = torch.cat((ids, token), 1)
        step.token.copy_(token)
        expected = llama.model(ids, use_cache=False).last_hidden_state[:, -1:]
        assert torch.allclose(step.hidden_states(), expected, atol=1e-5)
    token = torch.full((2, 1), 5)
    expected = llama(torch.cat((ids, token), 1)).logits[:, -1:].argmax(-1)
    assert torch.equal(step(token), expected)


@torch.inference_mode()
def test_filled_caches_are_as_long_as_said(hymba, llama):
    runner = LlamaRunner(llama)
    cache = runner.filled(3, 20, 30)
    assert int(cache.get_seq_length()) == 20 and all(t.shape[2] == 30 for t in cache_tensors(cache))
    assert runner.sequence_bytes(cache, 3) == 6 * 2 * 30 * 2 * 8 * 4
    own = HymbaRunner(hymba)
    cache = own.filled(3, 20, 30)
    assert cache.seen == 20 and cache.lengths.tolist() == [20] * 3
    rows, shared = hymba_tensors(cache)
    assert all(len(t) == 3 for t in rows) and all(t.shape[1] == 3 for t in shared)
    one = own.filled(1, 20, 30)
    assert own.sequence_bytes(cache, 3) == own.sequence_bytes(one, 1)
    token = own.step(cache, 3, 20, 30, graph=False)(torch.full((3, 1), 5))
    assert token.shape == (3, 1) and cache.seen == 21


def test_a_batch_that_does_not_fit_is_halved():
    tried, left_out = [], []

    def attempt(batch):
        tried.append(batch)
        if batch > 10:
            raise torch.OutOfMemoryError("too large")
        return batch

    assert halved(attempt, 37, "x", left_out) == 9 and tried == [37, 18, 9] and not left_out

    def never(batch):
        raise torch.OutOfMemoryError("too large")

    assert halved(never, 2, "x", left_out) is None and left_out == ["x: out of memory with a single sequence"]

    def broken(batch):
        raise RuntimeError("cannot be\ncaptured")

    assert halved(broken, 2, "y", left_out) is None and left_out[1] == "y: cannot be captured"


@torch.inference_mode()
def test_all_is_measured_or_said_to_be_left_out(hymba, llama):
    runners = {"hymba": HymbaRunner(hymba), "llama": LlamaRunner(llama)}
    found = measure(runners, [12, 40], [2], steps=2, prefill_rows=2, seconds=1000, graphs=False)
    assert [(r.model, r.length, r.batch, r.step) for r in found.decode] == [
        ("hymba", 12, 2, "eager"), ("llama", 12, 2, "eager"), ("hymba", 40, 2, "eager"), ("llama", 40, 2, "eager")
    ]  # fmt: skip
    assert [(r.model, r.length) for r in found.prefill] == [("hymba", 12), ("llama", 12), ("hymba", 40), ("llama", 40)]
    assert found.left_out == ["captured steps: there is no GPU"]
    (first, second) = ratios(found, "hymba")
    assert first["cache"] < second["cache"]  # Hymba's grows in its global layers alone
    none = measure(runners, [12], [2], steps=2, prefill_rows=2, seconds=-1, graphs=False)
    assert not none.decode and not none.prefill and len(none.left_out) == 5


def test_the_command_on_random_weights(tmp_path, capsys):
    code = main([
        "--random", "hymba_tiny", "--output", str(tmp_path), "--device", "cpu", "--dtype", "float32",
        "--lengths", "64,96", "--batches", "2", "--steps", "2", "--prefill-rows", "1", "--llama-groups", "1,2",
    ])  # fmt: skip
    assert code == 0 and (tmp_path / "throughput.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "throughput.json").read_text())
    assert set(found["settings"]["models"]) == {"hymba", "llama_mha", "llama_gqa2"}
    sizes = [facts["parameters"] for facts in found["settings"]["models"].values()]
    assert max(sizes) < 1.01 * min(sizes)
    assert len(found["decode"]) == 6 and len(found["prefill"]) == 6 and len(found["ratios"]) == 4
    assert all(row["tokens_per_second"] > 0 for row in found["decode"])
    assert "paper: Table 1" in capsys.readouterr().out


def test_random_weights_keep_states_in_float32():
    model = random_hymba("hymba_tiny", torch.bfloat16, "cpu")
    assert model.dtype == torch.bfloat16 and model.model.layers[0].mamba.A_log().dtype == torch.float32
    assert model.num_parameters() == 2_800_064


@pytest.mark.parametrize("recipe", ["concat_20m", "parallel_4heads_20m", "mamba_20m", "transformer_20m"])
def test_variants_have_a_hymba_and_an_opponent_of_the_same_size(recipe):
    from transformers import LlamaForCausalLM

    model = random_hymba(recipe, torch.bfloat16, "meta")
    described = sum(math.prod(tensor.shape) for tensor in model_tensors(compose([f"model={recipe}"]).model))
    assert model.num_parameters() == described
    with torch.device("meta"):
        opponent = LlamaForCausalLM(llama_config(model.config, model.num_parameters(), 1))
    assert opponent.num_parameters() == pytest.approx(described, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--random", "nonsense"], "nonsense"),
        (["--random", "mamba2_20m"], "the Hugging Face format of Hymba has no mamba2 layers"),
        (["--random", "hymba_tiny", "--lengths", "long"], "--lengths 'long': give whole numbers"),
        (["--random", "hymba_tiny", "--llama-groups", "3"], "do not divide by it"),
        (["--random", "hymba_tiny", "--steps", "0"], "--steps 0: give at least 1"),
        ([], "one of the arguments --model/--checkpoint --random is required"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, arguments, message):
    with pytest.raises(UserError) as caught:
        main([*arguments, "--output", str(tmp_path), "--device", "cpu"])
    assert message in str(caught.value) and "\n" not in str(caught.value)
