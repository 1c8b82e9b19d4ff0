"""The CUDA kernels of the selective scan on a CPU: their own source, compiled as C++ for a small warp emulator."""

from __future__ import annotations

import ctypes
import functools
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from hymba_train.ops import selective_scan_cuda as scan

HERE = Path(__file__).parent
needs_emulator = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ on x86-64"
)


def emulated_backend(*args, **kwargs) -> tuple[Tensor, Tensor]:
    """:func:`hymba_train.ops.selective_scan_cuda.selective_scan_cuda`, on the CPU; the backward too."""
    with mock.patch.object(
        scan, "_kernels", lambda x_dtype, bc_dtype, exact, device: emulated(x_dtype, bc_dtype, exact)
    ):
        return scan.selective_scan_cuda(*args, **kwargs)


class Emulator:
    """Stands in for :class:`hymba_train.ops.nvrtc.Module`."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.launched: list[str] = []

    def launch(self, name: str, blocks: int, threads: int, shared_bytes: int, params: scan.Params) -> None:
        self.launched.append(name)
        assert self.library.scan_launch(name.encode(), blocks, threads, shared_bytes, ctypes.byref(params)) == 0, name


def emulated(x_dtype: torch.dtype, bc_dtype: torch.dtype, exact: bool) -> Emulator:
    return _emulated(tuple(scan.defines(x_dtype, bc_dtype, exact).items()))


@functools.cache
def _emulated(names: tuple[tuple[str, int], ...]) -> Emulator:
    library = Path(tempfile.mkdtemp(prefix="scan_emulator_")) / "scan.so"
    defines = [f"-D{k}={v}" for k, v in names]
    include = [f"-I{HERE}", f"-I{Path(scan.__file__).with_name('cuda')}"]
    warnings = ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
    flags = ["-std=c++17", "-O2", "-mfma", "-fPIC", "-shared", *warnings]
    command = ["g++", *flags, *defines, *include, str(HERE / "scan_host.cpp"), "-o", str(library)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return Emulator(library)
