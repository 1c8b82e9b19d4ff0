"""``hymba bench`` without a GPU: what is asked of the contenders, and what is made of their results."""

import json
import subprocess
import sys

import psutil
import pytest

from hymba_train.bench import loader, scan, step
from hymba_train.bench.cli import BENCHMARKS, main
from hymba_train.bench.timing import Result
from hymba_train.config import compose
from hymba_train.errors import UserError
from hymba_train.plan import make_plan
from tests.children import has_ended


def result(name, ms, parts=None):
    return Result(name, 8, 2048, ms, 16384 / ms * 1e3, 10.565e9, 80.0, 7.5, parts or {})


def test_names_and_micro_batches():
    ours, dense = step.contenders(["ours_fp8:16", "dense:8"], 8192)
    assert (ours.module, ours.micro_batch, ours.arguments) == (None, 16, ("precision=fp8",))
    assert (dense.module, dense.seq_length) == ("hymba_train.bench.dense", 8192)
    (both,) = step.contenders(["ours_fp8_pp2:4"], 2048)
    assert (both.gpus, both.per_step, both.arguments) == (2, 8, ("precision=fp8", "parallel=pp2"))
    for wrong in ("ours", "ours:0", "theirs:8", "dense_dp2:8", "dp2:8"):
        with pytest.raises(UserError, match=wrong):
            step.contenders([wrong], 2048)


def test_our_training_run_is_one_that_plan_accepts(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(step, "call", lambda command, *_: asked.append(command))
    names = ["ours:8", "ours_fp8:8", "ours_documents:2", "ours_dp2:2", "ours_tp2:2", "ours_fp8_pp2:1"]
    for contender in step.contenders(names, 8192):
        with pytest.raises(FileNotFoundError):  # there is no run to read
            step.run(contender, 10, tmp_path, 1.0)
    for command in asked:
        overrides = [word for word in command[4:] if "=" in word]
        plan = make_plan(compose(overrides), 2 if "--nproc" in command else 1, check_paths=False)
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
    script = "print('ValueError: no'); print('leaked'); print('  error_file: <N/A>'); raise SystemExit(1)"
    with pytest.raises(UserError, match="exited 1: ValueError: no;"):
        step.call([sys.executable, "-c", script], tmp_path / "log", 20.0)


def test_what_is_out_of_time_leaves_no_process(tmp_path):
    script = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=subprocess.DEVNULL,
                         stderr=subprocess.DEVNULL)
print(child.pid, flush=True)
time.sleep(600)
"""
    with pytest.raises(UserError, match="not done after 20 s"):
        step.call([sys.executable, "-c", script], tmp_path / "log", 20.0)
    assert has_ended(psutil.Process(int((tmp_path / "log").read_text())))


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


@pytest.mark.parametrize("name", ["scan", "attention", "gemm"])
def test_without_a_gpu_they_refuse(name, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=f"bench {name}: no GPU here"):
        main([name])


def test_the_loader_is_measured(tmp_path):
    """In a process of its own, for it sets torch's threads. Of the figures only that they are there."""
    output = tmp_path / "loader.json"
    command = [sys.executable, "-m", "hymba_train", "bench", "loader", "--documents", "300", "--step-ms", "1"]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())
    assert [(row["packing"], row["seq_length"]) for row in rows] == list(loader.CASES)
    assert all(row["tokens_per_cpu_second"] > 0 and row["exposed_share"] >= 0 for row in rows)
    assert done.stdout.splitlines()[-1].startswith("| length_buckets | 8192 |")


def test_lines_of_the_scan():
    kernels = {"scan_forward": 361.0, "scan_backward": 901.25}
    row = dict(
        variant="cuda", size=(4, 2048), packed=True, ok=False, kernels_us=kernels, forward_ms=0.37, both_ms=1.35,
        host_us=300.0, host_forward_us=99.0, saved_mib=150.0,
    )  # fmt: skip
    text = scan.line(row)
    assert " ".join(text.split()) == "4 x 2048 cuda packed WRONG 361.0 901.2 370 980 99 300 150"
    assert len(text) == len(scan.HEADER.splitlines()[1])
    assert "nan" in scan.line(row | {"kernels_us": {}})  # a backend with other kernels
    assert [v.name for v in scan.variants() if not v.settings][:2] == ["cuda", "triton"]


def test_the_scan_tells_what_is_wrong_slow_or_late(monkeypatch, tmp_path, capsys):
    """Without a GPU: what is made of checks and times."""

    def measure(variant, batch, tokens, packed, seconds):
        if variant.name == "triton" and batch == 12:
            raise RuntimeError("out of memory")
        figures = dict.fromkeys(("forward_ms", "both_ms", "host_us", "host_forward_us", "saved_mib"), 1.0)
        return figures | {"kernels_us": {}}

    monkeypatch.setattr(scan, "need_gpu", lambda name: None)
    monkeypatch.setattr(scan.torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(scan, "compile_all", lambda chosen: None)
    monkeypatch.setattr(scan, "check", lambda variant, *case: {"y": 1.0 if variant.name == "triton" else 1e-6})
    monkeypatch.setattr(scan, "measure", measure)
    output = tmp_path / "scan.json"
    with pytest.raises(UserError, match="no cudo; there are"):
        main(["scan", "--only", "cudo"])
    assert main(["scan", "--only", "cuda", "--output", str(output)]) == 0
    assert [row["packed"] for row in json.loads(output.read_text())["times"]] == 4 * [False, True]
    assert main(["scan", "--only", "cuda", "triton"]) == 1
    printed = capsys.readouterr().out
    assert "triton WRONG" in printed and "triton (12, 2048): RuntimeError: out of memory" in printed
    assert main(["scan", "--only", "cuda", "--timeout", "0", "--output", str(output)]) == 1
    report = json.loads(output.read_text())
    assert not report["times"] and report["problems"][0] == "cuda (4, 2048): out of time"


def test_fp8_products_need_transformer_engine():
    with pytest.raises(UserError, match="--fp8 needs a GPU and Transformer Engine"):
        main(["gemm", "--device", "cpu", "--fp8", "delayed"])
