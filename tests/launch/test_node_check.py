"""The check of a node: each thing that can be wrong is found and named."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import node_check

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """smi("0, 3, 0\\n...", code) puts an nvidia-smi in front that prints this."""

    def make(output: str, code: int = 0) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\ncat << 'X'\n{output}\nX\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return make


def test_healthy_gpus(smi):
    smi("0, 3, 0\n1, 600, [N/A]")
    assert node_check.check_gpus(2) == [] and node_check.check_gpus(0) == []


@pytest.mark.parametrize(
    ("output", "code", "expected"),
    [
        ("0, 3, 0", 0, ["2 GPUs expected, nvidia-smi shows 1"]),
        ("0, 3, 0\n1, 70000, 0", 0, ["GPU 1: 70000 MiB in use by another process"]),
        ("0, 3, 12\n1, 3, 0", 0, ["GPU 0: 12 uncorrectable memory errors"]),
        (
            "Unable to determine the device handle",
            15,
            ["nvidia-smi exits with 15: Unable to determine the device handle"],
        ),
    ],
)
def test_sick_gpus(smi, output, code, expected):
    smi(output, code)
    assert node_check.check_gpus(2) == expected


def test_other_jobs_gpus_are_not_ours(smi, monkeypatch):
    smi("0, 70000, 0\n1, 3, 0\n2, 3, 0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    assert node_check.check_gpus(2) == []


def test_no_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert node_check.check_gpus(8) == ["8 GPUs expected, but there is no nvidia-smi"]


def test_disk(tmp_path, monkeypatch):
    assert node_check.check_disk(tmp_path, 0) == [] and list(tmp_path.iterdir()) == []
    assert "GiB free, 1e+09 wanted" in node_check.check_disk(tmp_path, 1e9)[0]
    assert "cannot be written" in node_check.check_disk(tmp_path / "missing", 0)[0]
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"other")
    assert node_check.check_disk(tmp_path, 0) == [f"{tmp_path}: a file comes back changed"]


def test_memory(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:    4194304 kB\n")
    assert node_check.check_memory(4, tmp_path / "meminfo") == []
    assert node_check.check_memory(5, tmp_path / "meminfo") == ["4.0 GiB of memory free, 5 wanted"]


def test_a_command_of_the_site():
    assert node_check.check_command("true", 10) == []
    assert node_check.check_command("echo all; echo GPU 3 failed; exit 4", 10) == [
        "'echo all; echo GPU 3 failed; exit 4' exits with 4: GPU 3 failed"
    ]
    assert node_check.check_command("sleep 20", 0.2) == ["'sleep 20' does not end within 0.2 s"]


def test_the_result_is_one_line_with_the_clock(tmp_path):
    for arguments, code, word in (([], 0, "ok"), (["--command", "printf 'a\\nb c'; exit 1"], 1, "bad")):
        assert node_check.main(["--result", str(tmp_path / "n1"), *arguments]) == code
        verdict, clock, *reason = (tmp_path / "n1").read_text().split(maxsplit=2)
        assert verdict == word and abs(int(clock) - time.time()) < 30
        assert (tmp_path / "n1").read_text().count("\n") == 1 and bool(reason) == (code == 1)


def test_it_starts_without_torch():
    code = "import sys, launch.node_check; print([m for m in sys.modules if m in ('torch', 'hydra', 'hymba_train')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n"
