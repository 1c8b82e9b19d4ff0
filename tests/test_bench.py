"""``hymba bench`` without a GPU: what is asked of the contenders, and what is made of their results."""

import json
import subprocess
import sys

import pytest

from hymba_train.bench import step
from hymba_train.bench.cli import BENCHMARKS, main
from hymba_train.bench.timing import Result
from hymba_train.config import compose
from hymba_train.errors import UserError
from hymba_train.plan import make_plan


def result(name, ms, parts=None):
    return Result(name, 8, 2048, ms, 16384 / ms * 1e3, 10.565e9, 80.0, 7.5, parts or {})


def test_names_and_micro_batches():
    ours, dense = step.contenders(["ours_fp8:16", "dense:8"], 8192)
    assert (ours.module, ours.micro_batch, ours.arguments) == (None, 16, ("precision=fp8",))
    assert (dense.module, dense.seq_length) == ("hymba_train.bench.dense", 8192)
    for wrong in ("ours", "ours:0", "theirs:8"):
        with pytest.raises(UserError, match=wrong):
            step.contenders([wrong], 2048)


def test_our_training_run_is_one_that_plan_accepts(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(step, "call", lambda command, *_: asked.append(command))
    for contender in step.contenders(["ours:8", "ours_fp8:8", "ours_documents:2"], 8192):
        with pytest.raises(FileNotFoundError):  # there is no run to read
            step.run(contender, 10, tmp_path, 1.0)
    for command in asked:
        plan = make_plan(compose(command[4:]), 1, check_paths=False)
        assert plan.phases[0].seq_length == 8192


def test_table_and_picture(tmp_path):
    results = [result("ours", 400.0, {"scan": 60.0, "matrix products": 220.0}), result("dense", 323.0)]
    lines = step.table(results)
    assert "40,960" in lines[1] and "43.7 %" in lines[1]
    assert "scan 30.0, matrix products 110.0; sum 140.0" in lines[3]
    step.draw(results, tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 10_000


def test_a_failing_contender_does_not_lose_the_others(monkeypatch, tmp_path, capsys):
    def run(contender, *_):
        if contender.name == "dense":
            raise UserError("dense exited 1")
        return result(contender.name, 400.0)

    monkeypatch.setattr(step, "run", run)
    assert step.main(["dense:8", "ours:8", "--output", str(tmp_path)]) == 1
    assert "40,960" in capsys.readouterr().out
    assert (tmp_path / "step.json").is_file()


def test_an_exit_code_and_the_last_line_are_told(tmp_path):
    with pytest.raises(UserError, match=r"exited 3: no GPU; see .*log"):
        step.call([sys.executable, "-c", "print('no GPU'); raise SystemExit(3)"], tmp_path / "log", 20.0)
    with pytest.raises(UserError, match="not done after 1 s"):
        step.call([sys.executable, "-c", "import time; time.sleep(9)"], tmp_path / "log", 1.0)


def test_unknown_benchmark():
    with pytest.raises(UserError, match="known are step"):
        main(["speed"])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_help(name):
    done = subprocess.run(
        [sys.executable, "-m", "hymba_train", "bench", name, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "usage" in done.stdout


def test_products_are_the_models_matrices():
    from hymba_train.bench.gemm import products
    from hymba_train.describe.flops import flops_per_token

    model = compose(["model=hymba_1p5b"]).model
    found = {(p.name, p.out_size, p.in_size): p.count for p in products(model)}
    assert found[("in_proj", 8960, 1600)] == 17 and found[("in_proj", 8000, 1600)] == 15
    assert found[("head", 32128, 1600)] == 1
    parts = flops_per_token(model, 10**9)  # so long that meta tokens weigh nothing
    per_token = sum(p.flops(1) * p.count for p in products(model) if p.name != "head")
    expected = sum(parts[part] for part in ("in_proj", "out_proj", "ffn", "ssm_proj"))
    assert per_token == pytest.approx(expected, rel=1e-6)


def test_products_are_measured(tmp_path, capsys):
    """On a CPU, for the sake of the code: shapes, gradients into float32, the table, the file."""
    output = tmp_path / "gemm.json"
    arguments = ["gemm", "--device", "cpu", "--model", "hymba_tiny", "--rows", "32", "--output", str(output)]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("bf16, all of them: ") and "a step of 32 rows" in lines[-1]
    assert all(row["both_ms"] > 0 for row in json.loads(output.read_text()))
    assert "linear_fc1" in "".join(lines)
