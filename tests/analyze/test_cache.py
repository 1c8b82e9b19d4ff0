"""The columns against the paper's printed figures, and against what the generator really holds."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from hymba_train.analyze import cache
from hymba_train.analyze.cache import main, paper_rows
from hymba_train.config import compose
from hymba_train.config.schema import ModelConfig
from hymba_train.describe import ModelDims
from hymba_train.describe.cache import cache_bytes
from hymba_train.errors import UserError


@pytest.mark.parametrize("row", paper_rows(), ids=lambda row: row["table"])
def test_what_the_paper_prints_comes_out_to_the_last_digit(row):
    """All 13 rows of Table 10, the sequential hybrid of Table 1, and the 1.5B."""
    assert row["comes_out"], row


def test_one_that_does_not_come_out_is_marked(monkeypatch):
    monkeypatch.setattr(cache, "ROWS", [replace(cache.ROWS[0], printed="1.88")])
    assert cache.paper_rows()[0]["comes_out"] is False


def test_the_1p5b_in_three_accountings():
    model = compose(["model=hymba_1p5b"]).model
    found = {how: cache_bytes(model, 8000, how).total_bytes / 1e6 for how in ("paper", "published", "ours")}
    assert found == pytest.approx({"paper": 78.602, "published": 81.88, "ours": 84.979}, abs=0.005)


def tiny(**changes) -> ModelConfig:
    return ModelConfig(
        **{
            "name": "tiny", "num_layers": 6, "hidden_size": 32, "ffn_hidden_size": 40, "num_attention_heads": 4,
            "num_query_groups": 2, "vocab_size": 61, "global_layers": [0, 5], "kv_groups": [[1, 2, 3]],
            "window_size": 6, "num_meta_tokens": 3, "mamba_state_dim": 4, "mamba_dt_rank": 3, **changes,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_meta_tokens": 0, "kv_groups": []},
        {"layer_pattern": ["hybrid", "ssm", "attention"], "kv_groups": [[2, 3]]},
        {"layer_pattern": ["attention"], "window_size": None},
        {"layer_pattern": ["ssm"], "kv_groups": []},
        {"branch_fusion": "concat", "v_head_dim": 6},
        {"kv_channels": 4},
    ],
)
def test_true_bytes_are_what_the_generator_holds(changes):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers", reason="transformers is not installed (extra 'hf')")
    from hymba_train.analyze.runners import HymbaRunner
    from hymba_train.convert.hf_config import TokenIds, hf_config
    from hymba_train.hf.configuration_hymba import HymbaConfig
    from hymba_train.hf.modeling_hymba import FLOAT32_MODULES, HymbaForCausalLM

    model = tiny(**changes)
    raw = {k: v for k, v in hf_config(model, "bfloat16", TokenIds()).items() if k not in ("auto_map", "torch_dtype")}
    hymba = HymbaForCausalLM(HymbaConfig(**raw)).bfloat16().eval()
    for name, module in hymba.named_modules():
        if name.rpartition(".")[2] in FLOAT32_MODULES:
            module.float()
    runner = HymbaRunner(hymba)
    held = {}
    with torch.inference_mode():
        for length in (3, 7, 23):
            kept = runner.prefill(torch.randint(3, 61, (1, length - 1)), length)
            runner.step(kept, 1, length - 1, length, graph=False)(torch.tensor([[5]]))
            held[length] = runner.sequence_bytes(kept, 1)
    assert [held[n] for n in (7, 23)] == [cache_bytes(model, n).total_bytes for n in (7, 23)]
    # Local layers get all W + 1 = 7 slots at once; of a shorter sequence the count leaves the empty ones out.
    local = [x for x in kept.kv if hymba.config.window(x) is not None]
    d = ModelDims.of(model)
    empty = len(local) * (7 - 3) * d.num_kv_heads * (d.head_dim + d.value_head_dim) * 2
    assert held[3] == cache_bytes(model, 3).total_bytes + empty


def test_the_command(tmp_path, capsys):
    assert main(["--output", str(tmp_path), "--lengths", "1024,8192", "--models", "hymba_1p5b,hymba_125m"]) == 0
    out = capsys.readouterr().out
    assert "hymba_1p5b        84.98           81.88                78.60" in out and "transformer_300m" in out
    found = json.loads((tmp_path / "cache.json").read_text())
    assert {"analysis", "hymba_train", "settings", "lengths", "bytes", "at", "bytes_at", "paper_rows"} == set(found)
    assert found["bytes_at"]["hymba_1p5b"]["published"] == [pytest.approx(81.88e6, rel=1e-4)]
    assert (tmp_path / "cache.png").read_bytes().startswith(b"\x89PNG")


def test_it_needs_no_torch_and_takes_every_recipe(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"from hymba_train.cli import main; sys.exit(main(['analyze', 'cache', '--output', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "hymba_tiny" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "hymba_1p6b"], "--models hymba_1p6b: "),
        (["--models", ","], "--models"),
        (["--lengths", "8k"], "--lengths '8k': give whole numbers"),
        (["--at", "0"], "--at 0: give at least 1"),
        (["--models", "hymba_tiny", "--output", "/dev/null/x"], "--output /dev/null/x: cannot be made"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, arguments, message):
    with pytest.raises(UserError) as caught:
        main(["--output", str(tmp_path), *arguments])
    assert message in str(caught.value) and "\n" not in str(caught.value)
