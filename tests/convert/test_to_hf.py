"""Exports of trained runs: files, types, shards, and the loss that training logged."""

from __future__ import annotations

import json
import math
import shutil
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer as Fast
from tokenizers.pre_tokenizers import WhitespaceSplit

from hymba_train.checkpoint import manifest
from hymba_train.convert.cli import run_convert, run_generate
from hymba_train.convert.load import load_model
from hymba_train.convert.shards import PlannedTensor, write_shards
from hymba_train.convert.source import CheckpointWeights, TrainingCheckpoint
from hymba_train.convert.to_hf import export_hf, parse_bytes
from hymba_train.errors import UserError
from hymba_train.evaluation.cli import run_eval
from hymba_train.evaluation.harness import parse_tasks
from hymba_train.evaluation.held_out import apart, held_out_losses
from tests.convert.test_convert_golden import asked, fresh

pytest.importorskip("transformers", reason="transformers is not installed (extra 'hf')")


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    return export_hf(runs.path("whole"), tmp_path_factory.mktemp("export") / "whole")


def test_an_environment_without_this_package_loads_an_export_with_its_tokenizer(runs, exported, tmp_path, plain_python):
    text = "w95"
    (found,) = fresh(plain_python, exported, tmp_path, asked([[5, 6, 7, 8] * 6], new_tokens=3, text=text))
    assert not found["left_over"] and found["generated"] == found["uncached"]
    assert found["encoded"] == [95] and found["decoded"] == text and found["padding_side"] == "left"
    model = load_model(runs.path("whole")).model
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6, 7, 8] * 6])).logits
    assert torch.equal(torch.tensor(found["logits"]), expected)


def test_held_out_loss_of_checkpoint_and_export_is_the_logged_one(runs, exported, capsys):
    logged = runs.held_out("whole")
    for arguments in ([str(runs.path("whole"))], [str(exported), "--data", str(runs.path("whole"))]):
        assert run_eval(["--model", *arguments, "--json", "--device", "cpu"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert {d: v["loss"] for d, v in found.items()} == pytest.approx(logged, abs=1e-5)
        assert all(v["perplexity"] == pytest.approx(math.exp(v["loss"])) and v["tokens"] > 0 for v in found.values())


@pytest.mark.parametrize("name, tolerance", [("masked", 1e-5), ("bf16", 2e-2)])
def test_held_out_loss_with_documents_apart_and_in_bf16(runs, name, tolerance):
    loaded = load_model(runs.path(name))
    config, phase = loaded.checkpoint.config, loaded.checkpoint.phase
    found = {d: x.loss for d, x in held_out_losses(loaded.model, config, phase, batch_size=3).items()}
    assert found == pytest.approx(runs.held_out(name), abs=tolerance)
    assert loaded.model.dtype is (torch.bfloat16 if name == "bf16" else torch.float32)


def test_documents_of_packed_rows_become_padded_rows():
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    rows, labels, mask = apart(tokens, tokens + 10, torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1]]))
    assert rows.tolist() == [[1, 2, 3], [4, 0, 0], [5, 0, 0], [6, 7, 8]]
    assert labels.tolist() == [[11, 12, 13], [14, -100, -100], [15, -100, -100], [16, 17, 18]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 1, 1]]


def test_config_tells_the_rope_of_the_last_phase_and_special_tokens(exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["rope_type"] == "ntk"  # the model's own is "default"
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 0, 0)  # it has </s> alone
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlicense: unknown\n")
    assert "Phase long: 256 text tokens in sequences of 32, batch 4, RoPE ntk; data: odd 20.0%, even 80.0%." in card


def test_bf16_exports_keep_what_rounding_would_change(runs, tmp_path):
    """A_log, D and dt bias stay float32, as none of theirs lies on bf16's grid; a float32 export holds all exactly."""
    half = load_file(export_hf(runs.path("whole"), tmp_path / "half", dtype="bfloat16") / "model.safetensors")
    full = load_file(export_hf(runs.path("whole"), tmp_path / "full") / "model.safetensors")
    assert {t.dtype for t in full.values()} == {torch.float32}
    exact = [name for name, t in half.items() if t.dtype is torch.float32]
    assert len(exact) == 3 * 4 and all(".A_log." in n or ".D." in n or n.endswith("dt_proj.0.bias") for n in exact)
    for name, tensor in full.items():
        assert torch.equal(half[name], tensor.to(half[name].dtype)), name
    model = load_model(tmp_path / "half").model
    assert model.get_parameter("model.layers.0.mamba.A_log.0").dtype is torch.float32
    assert model.model.layers[0].mamba.in_proj.weight.dtype is torch.bfloat16
    with safe_open(tmp_path / "half" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_bf16_exports_of_tensors_on_the_grid_are_bf16_throughout(runs):
    weights = CheckpointWeights(TrainingCheckpoint.find(runs.path("whole")))
    weights.read = lambda name: torch.zeros(2)
    assert {t.dtype for t in weights.plan(torch.bfloat16)} == {torch.bfloat16}


def test_shards_hold_every_tensor_once_and_an_index_says_where(runs, exported, tmp_path):
    arguments = ["--checkpoint", str(runs.path("whole")), "--output", str(tmp_path / "s"), "--license", "apache-2.0"]
    assert run_convert(["to-hf", *arguments, "--max-shard-size", "60KB"]) == 0
    index = json.loads((tmp_path / "s" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "s").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    shards = {file.name: load_file(file) for file in files}
    whole = load_file(exported / "model.safetensors")
    assert {n: f for f, tensors in shards.items() for n in tensors} == index["weight_map"]
    assert set(index["weight_map"]) == set(whole)
    assert all(torch.equal(shards[file][name], whole[name]) for name, file in index["weight_map"].items())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in whole.values())
    for file in shards.values():
        assert sum(t.numel() * 4 for t in file.values()) <= 60_000
    assert (tmp_path / "s" / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")
    logits = [load_model(path).model(torch.tensor([[1, 2, 3]])).logits for path in (tmp_path / "s", exported)]
    assert torch.equal(*logits)


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    alive = weakref.WeakSet()

    def read(name):
        assert len(alive) <= 1, "an earlier tensor is still held"  # the one just written may be
        tensor = torch.ones(100)
        alive.add(tensor)
        return tensor

    planned = [PlannedTensor(f"t{i}", (100,), torch.float32) for i in range(8)]
    assert len(write_shards(tmp_path, planned, read, 1600)) == 2


def test_nothing_half_written_is_left(runs, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hymba_train.convert.to_hf.write_shards", fail)
    with pytest.raises(UserError, match="No space left"):
        export_hf(runs.path("whole"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export_hf(runs.path("whole"), tmp_path / "out")


def test_generate_prints_prompts_with_their_continuations(runs, exported, tmp_path, capsys):
    prompts = ["w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11", "w7", "w3 w3"]
    (tmp_path / "prompts").write_text("\n".join(prompts) + "\n")
    common = ["--max-new-tokens", "12", "--device", "cpu"]
    one_by_one = []
    for prompt in prompts:
        assert run_generate(["--model", str(runs.path("whole")), "--prompt", prompt, *common]) == 0
        one_by_one.append(capsys.readouterr().out.rstrip("\n"))
    assert all(line.startswith(p) and len(line) > len(p) for p, line in zip(prompts, one_by_one, strict=True))
    run_generate(["--model", str(exported), "--prompts", str(tmp_path / "prompts"), "--json", *common])
    batch = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [b["prompt"] + b["completion"] for b in batch] == one_by_one
    sampling = ["--model", str(exported), "--prompt", "", "--temperature", "1.5", "--top-p", "0.9", *common]
    outputs = []
    for seed in ("1", "1", "2"):
        run_generate([*sampling, "--seed", seed])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_prompts_of_several_lengths_without_a_pad_token(exported, tmp_path, capsys):
    """Many a published config.json has none: prompts are padded with the published model's id then, unseen."""
    model = shutil.copytree(exported, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    words = Fast.from_file(str(exported / "tokenizer.json"))
    words.pre_tokenizer = WhitespaceSplit()  # else a text is one token
    words.save(str(tmp_path / "tokenizer.json"))
    common = ["--model", str(model), "--tokenizer", str(tmp_path), "--max-new-tokens", "6", "--device", "cpu"]
    prompts = ["--prompt", "w1 w2 w3 w4"], ["--prompt", "w7"]
    for prompt in prompts:
        run_generate([*common, *prompt])
    one_by_one = capsys.readouterr().out
    run_generate([*common, *prompts[0], *prompts[1]])
    assert capsys.readouterr().out == one_by_one


def test_what_cannot_be_is_one_line(runs, exported, tmp_path):
    whole = str(runs.path("whole"))
    for run, arguments, message in [
        (run_convert, ["to-hf", "--checkpoint", str(tmp_path), "--output", str(tmp_path / "x")], "neither a complete"),
        (run_convert, ["to-hf", "--checkpoint", whole], "--output"),
        (run_eval, ["--model", str(exported), "--device", "cpu"], "--data"),
        (run_eval, ["--model", whole, "--device", "tpu"], "--device tpu"),
        (run_eval, ["--model", whole, "--tasks", ",", "--device", "cpu"], "--tasks"),
        (run_generate, ["--model", whole, "--prompt", "a", "--top-p", "0", "--device", "cpu"], "--top-p"),
        (run_generate, ["--model", whole, "--prompts", str(tmp_path / "none")], "--prompts"),
        (run_generate, ["--model", str(tmp_path), "--prompt", "a"], "neither a complete"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            run(arguments)
        assert len(error.value.problems) == 1
    with pytest.raises(UserError, match="no size"):
        parse_bytes("5 apples")
    assert parse_tasks("paper") == {
        "mmlu": 5, "arc_easy": 0, "arc_challenge": 0, "piqa": 0, "winogrande": 0, "hellaswag": 0, "squad_completion": 1,
    }  # fmt: skip


def test_a_damaged_checkpoint_is_not_exported(runs, tmp_path):
    """One flipped bit, which every loader would take for a weight; a file that is cut short; and one that was cut short
    before its manifest was made."""
    step = tmp_path / "step_0000006"
    shutil.copytree(TrainingCheckpoint.find(runs.path("whole")).path, step)
    data = step / "__0_0.distcp"
    whole = data.read_bytes()
    middle = len(whole) // 2
    data.write_bytes(whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :])
    with pytest.raises(UserError, match=r"__0_0.distcp: is damaged.*; choose another checkpoint$"):
        export_hf(step, tmp_path / "out")
    data.write_bytes(whole[: len(whole) // 20])
    with pytest.raises(UserError, match=r"__0_0.distcp: has \d+ bytes"):
        export_hf(step, tmp_path / "out")
    manifest.write(step, manifest.make(step))
    with pytest.raises(UserError, match="cannot be read"):
        export_hf(step, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [step.name]
