"""``hymba doctor``: a page on a healthy machine; each kind of breakage found, named, and in the exit code."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hymba_train.cli import main
from hymba_train.doctor import kernels, ranks, software, speed
from hymba_train.doctor.report import BAD, OK, WARN, Finding, Report
from tests.children import child_environment
from tests.distributed.conftest import torchrun

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def logging_as_before():
    yield
    logging.disable(logging.NOTSET)


def test_a_healthy_machine(capsys, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert main(["doctor", "--quick", "--directory", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    for line in ("System", "Packages", "CUDA", "Kernels", "Speed"):
        assert f"\n{line}\n" in f"\n{page}"
    assert f"torch {torch.__version__}" in " ".join(page.split()) and "Network" not in page
    assert list(tmp_path.iterdir()) == []


def test_json_and_the_exit_code(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "kernels", lambda: 1 / 0)
    monkeypatch.setattr(software, "packages", lambda: [Finding("torch", "1", WARN)])
    assert main(["doctor", "--json", "--quick", "--directory", str(tmp_path)]) == 1
    page = json.loads(capsys.readouterr().out)
    assert page["broken"] and page["sections"]["Packages"][0]["level"] == "warn"
    assert page["sections"]["Kernels"][0]["advice"].startswith("ZeroDivisionError")
    assert main(["doctor", "--directory", "/no/such"]) == 2


def test_the_verdict():
    report = Report({"A": [Finding("a", "1"), Finding("bb", "2", WARN, "mind")], "B": [Finding("c", "3", BAD, "mend")]})
    assert report.text() == "A\n  a   1\n  bb  2  [warn] mind\n\nB\n  c   3  [BAD] mend\n\n1 broken, 1 to look at"
    assert report.is_broken and not Report({"A": [Finding("a", "1")]}).is_broken
    assert Report({"A": [Finding("a", "1")]}).text().endswith("all well")


def test_packages_that_are_missing_or_do_not_load(monkeypatch, tmp_path):
    (tmp_path / "halfbuilt.py").write_text("raise OSError('libcudart.so.12: undefined symbol')\n")
    info = tmp_path / "halfbuilt-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halfbuilt\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(
        software,
        "PACKAGES",
        (("halfbuilt", "halfbuilt", False), ("no-such", "no_such", True), ("nor-that", "x", False)),
    )
    broken, needed, optional = software.packages()
    assert broken.level == BAD and "undefined symbol; reinstall it" in broken.advice
    assert needed.level == BAD and needed.advice == "pip install no-such"
    assert (optional.value, optional.level) == ("not installed", OK)


@pytest.mark.parametrize(
    ("output", "code", "level"),
    [("NVIDIA H200, 570.1\nNVIDIA H200, 570.1", 0, BAD), ("Failed to initialize NVML", 18, BAD), ("", 0, OK)],
)
def test_gpus_that_torch_does_not_see(monkeypatch, tmp_path, output, code, level):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{output}'\nexit {code}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    worst = [f for f in software.drivers() if f.level != OK]
    assert bool(worst) == (level == BAD)


def test_every_backend_is_run(monkeypatch):
    findings = kernels.kernels()
    assert {"attention", "selective_scan", "causal_conv_rows"} <= {f.name for f in findings}
    if not torch.cuda.is_available():
        assert any(f.name.strip() == "reference" and "agrees with torch" in f.value for f in findings)
        assert any(f.name.strip() == "flex" and "not here" in f.value for f in findings)
    assert all(f.level == OK for f in findings)


def test_a_backend_that_computes_something_else(monkeypatch):
    right = kernels.run
    monkeypatch.setattr(
        kernels, "run", lambda op, name, *args: right(op, name, *args) * (1 if name == "torch" else 1.1)
    )
    wrong = [f for f in kernels.kernels() if f.level == BAD]
    assert [f.name.strip() for f in wrong] == ["reference", "reference"]  # of the two scans
    assert all(f.value.startswith("wrong: off by") for f in wrong)

    def fails(op, name, *args):
        if name == "reference":
            raise RuntimeError("no kernel image is available")
        return right(op, name, *args)

    monkeypatch.setattr(kernels, "run", fails)
    broken = [f for f in kernels.kernels() if f.level == BAD]
    assert len(broken) == 2
    assert all("no kernel image is available; choose another backend" in f.advice for f in broken)


def test_figures_against_the_data_sheet():
    assert speed._against_peak("x", 3e12, 4.8e12, 0.6, 1e9, "GB/s") == Finding(
        "x", "3,000 GB/s (62% of the data sheet)"
    )
    assert speed._against_peak("x", 2e12, 4.8e12, 0.6, 1e9, "GB/s").level == WARN
    assert speed._against_peak("x", 2e12, None, 0.6, 1e9, "GB/s") == Finding("x", "2,000 GB/s")


def test_a_device_that_miscounts(monkeypatch):
    assert speed._exact_product("cpu").level == OK
    monkeypatch.setattr(torch, "equal", lambda a, b: False)
    assert speed._exact_product("cpu").level == BAD


def test_a_disk(tmp_path, monkeypatch):
    (fine,) = speed.disk(tmp_path, quick=True)
    assert "MB/s" in fine.value and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(speed, "LOW_DISK_BYTES", 1e15)
    assert speed.disk(tmp_path, quick=True)[0].level == WARN
    (broken,) = speed.disk(Path("/proc"), quick=True)
    assert broken.level == BAD and "give another --directory" in broken.advice


def test_small_shared_memory(monkeypatch):
    monkeypatch.setattr(software.shutil, "disk_usage", lambda path: type("Usage", (), {"total": 2**26})())
    assert software._shared_memory()[1] == WARN


def test_who_is_launched(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "1")
    assert ranks.is_launched()
    monkeypatch.delenv("RANK")
    assert not ranks.is_launched()


@pytest.mark.distributed
def test_under_torchrun_one_page_for_all(tmp_path):
    done = torchrun(2, "hymba_train", "doctor", "--quick", "--directory", str(tmp_path))
    assert done.stdout.count("Packages") == 1
    assert "4 MiB over 2 ranks, gloo" in done.stdout and "s between ranks" in done.stdout
    assert "other ranks" in done.stdout and "nothing broken" in done.stdout and "all well" in done.stdout


@pytest.mark.distributed
@pytest.mark.slow
def test_one_broken_rank_breaks_all(tmp_path):
    program = tmp_path / "half_broken.py"
    program.write_text(
        "import os\nfrom pathlib import Path\n"
        "from hymba_train.cli import main\nfrom hymba_train.doctor import software\n"
        "from hymba_train.doctor.report import BAD, Finding\n"
        "if os.environ['RANK'] == '1':\n    software.packages = lambda: [Finding('torch', 'gone', BAD, 'mend it')]\n"
        f"code = main(['doctor', '--quick', '--directory', {str(tmp_path)!r}])\n"
        f"Path({str(tmp_path / 'code')!r} + os.environ['RANK']).write_text(str(code))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    environment = child_environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert [(tmp_path / f"code{rank}").read_text() for rank in range(2)] == ["1", "1"], done.stderr
    assert "rank 1 on" in done.stdout and "torch: gone" in done.stdout and "mend it" in done.stdout
