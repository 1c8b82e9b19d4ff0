"""Broken and hostile input: one line, no code run, nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from hymba_train.checkpoint import manifest
from hymba_train.checkpoint.index import read_index
from hymba_train.convert.cli import run_convert
from hymba_train.convert.from_hf import import_hf
from hymba_train.convert.load import load_model
from hymba_train.convert.source import TrainingCheckpoint
from hymba_train.convert.to_hf import export_hf
from hymba_train.errors import UserError
from tests import golden_data

TRAP = "trap-was-run"


class Trap:
    """Unpickling it creates the file named TRAP in the working directory."""

    def __reduce__(self):
        return (open, (TRAP, "w"))


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A good directory to spoil; the working directory is empty."""
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "model"
    shutil.copytree(golden_data.directory("a_pair_triple_ntk"), directory)
    for name in ("golden.json", "golden.safetensors"):
        (directory / name).unlink()
    return directory


def edit_config(model, **changes):
    path = model / "config.json"
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))


def edit_weights(model, edit):
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors")


def split(model, weight_map=None):
    """Two shards and an index; weight_map(mapping) spoils it."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:50], "model-00002-of-00002.safetensors": names[50:]}
    for file, part in files.items():
        save_file({n: tensors[n] for n in part}, model / file)
    mapping = {n: file for file, part in files.items() for n in part}
    if weight_map:
        weight_map(mapping)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))


def truncate(model):
    path = model / "model.safetensors"
    os.truncate(path, path.stat().st_size - 5000)


def truncate_shard(model):
    split(model)
    path = model / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def only_pickle(model):
    (model / "model.safetensors").unlink()
    with open(model / "pytorch_model.bin", "wb") as file:
        pickle.dump(Trap(), file)


def tokenizer_with(name, content):
    """Spoils a tokenizer that is whole otherwise."""

    def spoil(model):
        words = tokenizers.models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>")
        tokenizers.Tokenizer(words).save(str(model / "tokenizer.json"))
        (model / name).write_text(content)

    return spoil


def index_to_pickle(model):
    split(model, lambda m: m.update({"model.memory_tokens": "weights.bin"}))
    with open(model / "weights.bin", "wb") as file:
        pickle.dump(Trap(), file)


A = "model.layers.0.mamba.A_log.0"
SPOILED = {
    "truncated file": (truncate, "model.safetensors: damaged"),
    "truncated shard": (truncate_shard, "model-00002-of-00002.safetensors: damaged"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "pickle": (only_pickle, "pytorch_model.bin is not read, as loading it can run code"),
    "index to a pickle": (index_to_pickle, "'weights.bin', which is no .safetensors file"),
    "index outside": (
        lambda m: split(m, lambda x: x.update({A: "../outside.safetensors"})), "'../outside.safetensors', which is no"
    ),
    "index absolute": (lambda m: split(m, lambda x: x.update({A: "/etc/x.safetensors"})), "'/etc/x.safetensors'"),
    "index to nothing": (lambda m: split(m, lambda x: x.update({A: "gone.safetensors"})), "gone.safetensors: no such"),
    "index to a number": (lambda m: split(m, lambda x: x.update({A: 7})), "lies in 7, which is no"),
    "index too short": (lambda m: split(m, lambda x: x.pop(A)), "the index says None"),
    "index to nowhere": (
        lambda m: split(m, lambda x: x.update({"x": "model-00001-of-00002.safetensors"})), "x is not in model-00001"
    ),
    "no index map": (lambda m: (m / "model.safetensors.index.json").write_text("{}"), "there is no weight_map"),
    "broken index": (lambda m: (m / "model.safetensors.index.json").write_text("{"), "index.json: cannot be read"),
    "tensor missing": (lambda m: edit_weights(m, lambda t: t.pop(A)), f"{A}: missing"),
    "tensor too many": (lambda m: edit_weights(m, lambda t: t.update(x=torch.ones(1))), "x: no such tensor"),
    "wrong shape": (lambda m: edit_weights(m, lambda t: t.update({A: t[A].t().contiguous()})), f"{A}: has shape"),
    "wrong type": (lambda m: edit_weights(m, lambda t: t.update({A: t[A].double()})), f"{A}: is F64"),
    "another head": (
        lambda m: edit_weights(m, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        "lm_head.weight: differs",
    ),
    "no config": (lambda m: (m / "config.json").unlink(), "config.json: no such file"),
    "config no JSON": (lambda m: (m / "config.json").write_text("not JSON"), "config.json: cannot be read"),
    "config a list": (lambda m: (m / "config.json").write_text("[]"), "not a JSON object"),
    "config too deep": (lambda m: (m / "config.json").write_text("[" * 200_000), "config.json: cannot be read"),
    "another model": (lambda m: edit_config(m, model_type="llama"), "model_type is 'llama'"),
    "key missing": (lambda m: edit_config(m, hidden_size="absent"), "hidden_size is missing"),
    "size no number": (lambda m: edit_config(m, hidden_size="64"), "config.json: model.hidden_size: expected int"),
    "size a list": (lambda m: edit_config(m, num_attention_heads=[4]), "config.json: model.num_attention"),
    "size zero": (lambda m: edit_config(m, num_attention_heads=0), "config.json: not a Hymba configuration"),
    "size null": (lambda m: edit_config(m, vocab_size=None), "vocab_size"),
    "size huge": (lambda m: edit_config(m, num_hidden_layers=10**9), "num_hidden_layers = 1000000000 cannot be"),
    "token no number": (lambda m: edit_config(m, pad_token_id="x"), "pad_token_id = 'x' cannot be"),
    "groups no lists": (lambda m: edit_config(m, kv_reuse_group=[3]), "config.json"),
    "groups outside": (lambda m: edit_config(m, kv_reuse_group=[[6, 99]]), "99 is not a layer"),
    "tokenizer broken": (tokenizer_with("tokenizer.json", "{}"), "tokenizer.json cannot be read as a tokenizer"),
    "tokenizer no JSON": (tokenizer_with("added_tokens.json", "["), "added_tokens.json: cannot be read"),
    "tokenizer with code": (
        tokenizer_with("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["evil/repo--evil.Tokenizer", null]}}'),
        "tokenizer_config.json: auto_map names code to be run",
    ),
    "experts": (lambda m: edit_config(m, num_experts=16), "num_experts = 16 is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_spoiled_is_refused_with_one_line(model, tmp_path, name):
    spoil, message = SPOILED[name]
    spoil(model)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(UserError) as error:
        run_convert(["from-hf", "--model", str(model), "--output", str(tmp_path / "run")])
    assert len(error.value.problems) == 1 and "\n" not in str(error.value)
    assert message in str(error.value) and str(model) in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    with pytest.raises(UserError):
        load_model(model).transformers_tokenizer()
    assert not (tmp_path / TRAP).exists()


def test_many_problems_are_a_line_each_up_to_ten(model, tmp_path):
    edit_weights(model, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".A_log." in name])
    edit_weights(model, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".D." in name])
    with pytest.raises(UserError) as error:
        import_hf(model, tmp_path / "run")
    assert len(error.value.problems) == 11 and error.value.problems[-1].endswith("and 6 tensors more")


def test_code_beside_the_weights_is_neither_run_nor_copied(model, tmp_path):
    """auto_map, Python files, pickles and odd files beside good weights: imported without touching them."""
    trap = f"open({str(tmp_path / TRAP)!r}, 'w')\n"
    edit_config(model, auto_map={"AutoConfig": "evil.HymbaConfig", "AutoModelForCausalLM": "evil.HymbaForCausalLM"})
    for name in ("evil.py", "configuration_hymba.py", "modeling_hymba.py", "__init__.py", "sitecustomize.py"):
        (model / name).write_text(trap)
    with open(model / "pytorch_model.bin", "wb") as file:
        pickle.dump(Trap(), file)
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: some-licence-1.0\n---\n# A model\n")
    export = export_hf(import_hf(model, tmp_path / "run"), tmp_path / "export")
    load_model(model)
    load_model(export)
    assert not (tmp_path / TRAP).exists()
    assert (
        json.loads((export / "config.json").read_text())["auto_map"]["AutoConfig"] == "configuration_hymba.HymbaConfig"
    )
    assert not any(trap in path.read_text() for path in export.glob("*.py"))
    assert (export / "README.md").read_text().startswith("---\nlicense: some-licence-1.0\n")


def test_a_checkpoint_index_that_is_a_trap_is_refused(model, tmp_path):
    """.metadata is a pickle: foreign classes, foreign files and damage are refused, and nothing is run."""
    run = import_hf(model, tmp_path / "run")
    step = TrainingCheckpoint.find(run).path
    index = read_index(step)
    good = (step / ".metadata").read_bytes()
    for spoiled, message in [
        (pickle.dumps(Trap()), "io.open|builtins.open"),
        (pickle.dumps(os.system), "posix.system|nt.system"),
        (pickle.dumps({"a": 1}), "it is no index"),
        (good[: len(good) // 2], "cannot be read"),
        (b"", "cannot be read"),
    ]:
        (step / ".metadata").write_bytes(spoiled)
        manifest.write(step, manifest.make(step))  # whoever can write the one can write the other
        with pytest.raises(UserError, match=message):
            export_hf(run, tmp_path / "export")
    next(iter(index.storage_data.values())).relative_path = "../../model/model.safetensors"
    (step / ".metadata").write_bytes(pickle.dumps(index))
    manifest.write(step, manifest.make(step))
    with pytest.raises(UserError, match="not in this directory"):
        export_hf(run, tmp_path / "export")
    assert not (tmp_path / TRAP).exists() and not (tmp_path / "export").exists()


def test_a_checkpoint_of_another_model_is_refused(model, tmp_path):
    step = TrainingCheckpoint.find(import_hf(model, tmp_path / "run")).path
    path = step / "checkpoint.json"
    content = json.loads(path.read_text())
    content["config"]["model"]["ffn_hidden_size"] += 1
    path.write_text(json.dumps(content))
    manifest.write(step, manifest.make(step))
    with pytest.raises(
        UserError, match=r"linear_fc1.weight.gate has shape \[96, 64\]; the configuration asks for \[97, 64\]"
    ):
        export_hf(tmp_path / "run", tmp_path / "export")


def test_settings_of_a_tokenizer_without_a_vocabulary_are_no_tokenizer(model, tmp_path):
    (model / "tokenizer_config.json").write_text('{"padding_side": "left"}')
    export = export_hf(import_hf(model, tmp_path / "run"), tmp_path / "export")
    assert "There is no tokenizer" in (export / "README.md").read_text()
    assert not (export / "tokenizer_config.json").exists()


def test_a_head_stored_beside_a_tied_embedding_is_dropped(model, tmp_path):
    edit_weights(model, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    export = export_hf(import_hf(model, tmp_path / "run"), tmp_path / "export")
    assert "lm_head.weight" not in load_file(export / "model.safetensors")


def test_shards_are_read_through_their_index(model, tmp_path):
    whole = load_file(model / "model.safetensors")
    split(model)
    export = export_hf(import_hf(model, tmp_path / "run"), tmp_path / "export")
    again = load_file(export / "model.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[n], again[n]) for n in whole)
