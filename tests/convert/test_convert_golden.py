"""Golden cases in and out again, and used by a process that has never heard of this package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hymba_train.convert.from_hf import import_hf
from hymba_train.convert.source import HubWeights, TrainingCheckpoint
from hymba_train.convert.to_hf import export_hf
from hymba_train.model import build_model_chunks
from tests import golden_data

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


def fresh(export: Path, tmp_path: Path, *, ids, mask=None, new_tokens=12, text=None, site: Path | None = None) -> dict:
    """Answers of a fresh process; ``site``: a directory with other versions of transformers and its needs."""
    asked = {"ids": ids, "mask": mask, "new_tokens": new_tokens, "text": text}
    (tmp_path / "requests.json").write_text(json.dumps(asked))
    empty = tmp_path / "empty"
    empty.mkdir(exist_ok=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HYMBA"))}
    env |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    start = ["-I", str(SCRIPT)]
    if site is not None:
        start = ["-I", "-c", f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv = sys.argv[1:]; "
                 f"exec(compile(open(sys.argv[0]).read(), 'fresh', 'exec'))", str(SCRIPT)]  # fmt: skip
    arguments = [str(export), str(tmp_path / "requests.json"), str(tmp_path / "answers.json")]
    done = subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=empty,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((tmp_path / "answers.json").read_text())


def check_fresh(converted, tmp_path, site=None):
    case, _, exported = converted
    prompt = case.tensors["gen.prompt_ids"]
    found = fresh(exported, tmp_path, ids=prompt.tolist(), site=site)
    assert found["module"].startswith("transformers_modules.") and not found["left_over"]
    expected = case.tensors["gen.full.ids"][:, prompt.shape[1] :].tolist()
    assert found["generated"] == found["uncached"] == found["one_by_one"] == expected
    first_step = case.tensors["gen.full.step_logits"][0, 0]
    assert (torch.tensor(found["logits"])[0, -1] - first_step).abs().max() <= case.tolerance["logits_max_abs"]
    return found


def test_a_fresh_process_reproduces_the_published_generation(converted, tmp_path):
    check_fresh(converted, tmp_path)


def test_a_fresh_process_generates_left_padded_batches_as_one_by_one(tmp_path):
    """Prompts of 2 to 21 tokens and 16 new ones, window 8: both sides of it, and of the meta tokens, in one batch."""
    case = golden_data.load("a_pair_triple_ntk")
    exported = export_hf(import_hf(golden_data.directory(case.name), tmp_path / "run"), tmp_path / "export")
    rows = case.tensors["input_ids"]
    lengths = (2, 9, 21)
    ids = [[0] * (21 - n) + rows[i % 2, :n].tolist() for i, n in enumerate(lengths)]
    mask = [[0] * (21 - n) + [1] * n for n in lengths]
    found = fresh(exported, tmp_path, ids=ids, mask=mask, new_tokens=16)
    assert found["generated"] == found["one_by_one"] == found["uncached"]


@pytest.mark.slow
def test_a_fresh_process_with_transformers_4(converted, tmp_path_factory, tmp_path):
    """Installs transformers 4.57.6 with what it needs into a directory of its own."""
    site = tmp_path_factory.getbasetemp() / "transformers4"
    if not site.exists():
        needs = ["transformers==4.57.6", "huggingface_hub<1.0", "tokenizers<=0.23.0,>=0.22.0", "requests", "regex",
                 "charset_normalizer", "urllib3", "certifi", "idna"]  # fmt: skip
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), *needs]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(site, ignore_errors=True)
            pytest.skip(f"transformers 4.57.6 cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    assert check_fresh(converted, tmp_path, site)["transformers"] == "4.57.6"


def test_weights_of_a_checkpoint_have_the_published_names_and_shapes(converted):
    case, run, _ = converted
    weights = HubWeights(TrainingCheckpoint.find(run))
    planned = {t.name: t.shape for t in weights.plan(torch.float32)}
    assert planned == {name: tuple(t.shape) for name, t in case.hf_weights.items()}
