"""Golden cases in and out again, and used by a process that has never heard of this package."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hymba_train.convert.from_hf import import_hf
from hymba_train.convert.source import CheckpointWeights, TrainingCheckpoint
from hymba_train.convert.to_hf import export_hf
from hymba_train.model import build_model_chunks
from tests import golden_data
from tests.convert.plain_venv import clean_env, make_venv

pytest.importorskip("transformers", reason="transformers is not installed (extra 'hf')")
SCRIPT = Path(__file__).with_name("fresh_process.py")


@pytest.fixture(scope="module", params=golden_data.cases())
def converted(request, tmp_path_factory):
    """(case, imported run, export of it)"""
    path = tmp_path_factory.mktemp(request.param)
    run = import_hf(golden_data.directory(request.param), path / "imported")
    return golden_data.load(request.param), run, export_hf(run, path / "exported")


def test_tensors_come_back_bit_for_bit(converted):
    case, _, exported = converted
    found = load_file(exported / "model.safetensors")
    assert set(found) == set(case.hf_weights)
    for name, tensor in case.hf_weights.items():
        assert found[name].dtype is tensor.dtype and torch.equal(found[name], tensor), name


def test_config_comes_back(converted):
    """transformers_version is that of a writer; seq_length there is the length of the golden batch, unused by us."""
    case, _, exported = converted
    found = json.loads((exported / "config.json").read_text())
    ignored = {"transformers_version", "seq_length"}
    expected = {k: v for k, v in case.config_json.items() if k not in ignored}
    assert {k: v for k, v in found.items() if k not in ignored} == expected | {"dtype": "float32"}
    assert found["seq_length"] == case.config.max_position_embeddings
    generation = json.loads((exported / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 0)


def test_an_export_without_a_tokenizer_says_so(converted):
    _, _, exported = converted
    assert "There is no tokenizer" in (exported / "README.md").read_text()
    assert sorted(p.name for p in exported.iterdir()) == [
        "README.md", "config.json", "configuration_hymba.py", "generation_config.json", "model.safetensors",
        "modeling_hymba.py",
    ]  # fmt: skip


def test_the_checkpoint_loads_into_the_training_model(converted, lone_runtime):
    """Through Megatron-Core's own loader, weights only, and gives the golden logits and the padded batch's."""
    from megatron.core import dist_checkpointing

    case, run, _ = converted
    checkpoint = TrainingCheckpoint.find(run)
    config = checkpoint.config
    config.run.device = "cpu"
    (model,) = build_model_chunks(config, lone_runtime, [range(config.model.num_layers)])
    loaded = dist_checkpointing.load(model.sharded_state_dict(), str(checkpoint.path))
    model.load_state_dict(loaded)
    batches = [name for name in ("", "padded.") if f"{name}input_ids" in case.tensors]
    for name in batches:
        with torch.no_grad():
            logits = model(case.tensors[f"{name}input_ids"])
        assert (logits - case.tensors[f"{name}logits"]).abs().max() <= case.tolerance["logits_max_abs"]


def asked(ids, mask=None, new_tokens=12, text=None) -> dict:
    return {"ids": ids, "mask": mask, "new_tokens": new_tokens, "text": text}


def fresh(python: Path, export: Path, tmp_path: Path, *requests: dict) -> list[dict]:
    """Answers of a fresh process of ``python``, which belongs to an environment without this package."""
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    empty = tmp_path / "empty"
    empty.mkdir(exist_ok=True)
    env = clean_env() | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [str(export), str(tmp_path / "requests.json"), str(tmp_path / "answers.json")]
    done = subprocess.run(
        [str(python), "-I", str(SCRIPT), *arguments],
        cwd=empty, env=env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((tmp_path / "answers.json").read_text())


def check_fresh(converted, tmp_path, python):
    """The golden logits and generation, and a batch of left-padded prompts of 2 to 21 tokens with 16 new ones: windows
    of 6 to 14 and the meta tokens are passed in some rows and not in others."""
    case, _, exported = converted
    prompt, rows, lengths = case.tensors["gen.prompt_ids"], case.tensors["input_ids"], (2, 9, 21)
    ids = [[0] * (21 - n) + rows[i % 2, :n].tolist() for i, n in enumerate(lengths)]
    mask = [[0] * (21 - n) + [1] * n for n in lengths]
    found = fresh(
        python, exported, tmp_path,
        asked(prompt.tolist()), asked(rows.tolist(), new_tokens=4), asked(ids, mask, new_tokens=16),
    )  # fmt: skip
    for answer in found:
        assert answer["module"].startswith("transformers_modules.") and not answer["left_over"]
        assert answer["generated"] == answer["uncached"] == answer["one_by_one"]
    assert found[0]["generated"] == case.tensors["gen.full.ids"][:, prompt.shape[1] :].tolist()
    first_step, tolerance = case.tensors["gen.full.step_logits"][0, 0], case.tolerance["logits_max_abs"]
    assert (torch.tensor(found[0]["logits"])[0, -1] - first_step).abs().max() <= tolerance
    assert (torch.tensor(found[1]["logits"]) - case.tensors["logits"]).abs().max() <= tolerance
    return found[0]["transformers"]


def test_an_environment_without_this_package_reproduces_the_published_numbers(converted, tmp_path, plain_python):
    assert check_fresh(converted, tmp_path, plain_python) == importlib.metadata.version("transformers")


@pytest.fixture(scope="module", params=["4.50.3", "4.57.6", "5.0.0"])
def other_python(request, tmp_path_factory):
    """(version, python) of an environment with another transformers: the oldest, the last 4, the first 5."""
    try:
        return request.param, make_venv(tmp_path_factory.mktemp(request.param), request.param)
    except RuntimeError as error:
        pytest.skip(f"transformers {request.param} cannot be installed here: {error}")


@pytest.mark.slow
def test_environments_with_other_versions_of_transformers_do(converted, tmp_path, other_python):
    version, python = other_python
    assert check_fresh(converted, tmp_path, python) == version


def test_weights_of_a_checkpoint_have_the_published_names_and_shapes(converted):
    case, run, _ = converted
    weights = CheckpointWeights(TrainingCheckpoint.find(run))
    planned = {t.name: t.shape for t in weights.plan(torch.float32)}
    assert planned == {name: tuple(t.shape) for name, t in case.hf_weights.items()}
