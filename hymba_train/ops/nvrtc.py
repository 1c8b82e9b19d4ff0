"""CUDA C++ compiled at run time (NVRTC, through cuda-bindings), kept on disk as cubins and launched without PyTorch.

No compiler is needed on the machine: NVRTC comes with PyTorch's CUDA wheels. The first use on a machine takes seconds;
later ones read ``$HYMBA_KERNEL_CACHE`` (default ``~/.cache/hymba_train/kernels``), keyed by source, options and device;
where that cannot be written, every start compiles anew, and says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hymba_train.errors import UserError

logger = logging.getLogger(__name__)
_warned: set[Path] = set()


class Module:
    """The kernels of one source on one device.

    ``launch`` starts one on the current stream of that device. Grids and blocks have one dimension.
    """

    def __init__(self, source: str, defines: dict[str, int], device_index: int) -> None:
        self.device_index = device_index
        options = compiler_options(torch.cuda.get_device_capability(device_index), defines)
        from cuda.bindings import driver

        self._driver = driver
        cubin = cached_cubin(source, options)
        torch.cuda.init()
        (device,) = _checked(driver.cuDeviceGet(device_index))
        (self._context,) = _checked(driver.cuDevicePrimaryCtxRetain(device))  # PyTorch's own
        with self._current():
            (self._library,) = _checked(driver.cuModuleLoadData(cubin))
        self._handles: dict[tuple[str, int], int] = {}

    def launch(self, name: str, blocks: int, threads: int, shared_bytes: int, params: ctypes.Structure) -> None:
        """Start ``blocks`` blocks of kernel ``name``, whose only parameter is the struct ``params``."""
        # Many calls a training step: the driver by ctypes, a few times cheaper than cuda-bindings.
        library, context, before = _libcuda(), int(self._context), ctypes.c_void_p()
        stream = torch._C._cuda_getCurrentRawStream(self.device_index)
        handle = self._handles.get((name, shared_bytes))
        if handle is None:
            with self._current():
                handle = self._handles[name, shared_bytes] = int(self._function(name, shared_bytes))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        _check_code(library.cuCtxGetCurrent(ctypes.byref(before)))
        # A thread of autograd may have no context yet, or another device's.
        is_current = before.value == context
        if not is_current:
            _check_code(library.cuCtxSetCurrent(context))
        try:
            _check_code(
                library.cuLaunchKernel(handle, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, pointers, None)
            )
        finally:
            if not is_current:
                _check_code(library.cuCtxSetCurrent(before))

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """The device's context current: a thread of autograd may have none yet, or another device's."""
        (before,) = _checked(self._driver.cuCtxGetCurrent())
        if int(before) == int(self._context):
            yield
            return
        _checked(self._driver.cuCtxSetCurrent(self._context))
        try:
            yield
        finally:
            _checked(self._driver.cuCtxSetCurrent(before))

    def _function(self, name: str, shared_bytes: int) -> Any:
        driver = self._driver
        (function,) = _checked(driver.cuModuleGetFunction(self._library, name.encode()))
        attributes = driver.CUfunction_attribute
        if shared_bytes > 48 * 1024:
            most = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(function, most, shared_bytes))
        if shared_bytes > 16 * 1024:  # else several blocks may not find room beside a large L1 cache
            share = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            _checked(driver.cuFuncSetAttribute(function, share, 100))
        return function


def compile_cubin(source: str, options: list[str]) -> bytes:
    """Machine code of ``source``. Raises UserError with the compiler's log if it does not compile."""
    from cuda.bindings import nvrtc

    (program,) = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], []))
    result = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        (size,) = _checked(nvrtc.nvrtcGetProgramLogSize(program))
        log = b" " * size
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        text = log.decode(errors="replace").strip("\0\n ")
        raise UserError(f"NVRTC cannot compile a kernel ({' '.join(options)}): {text}")
    (size,) = _checked(nvrtc.nvrtcGetCUBINSize(program))
    cubin = b" " * size
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return cubin


def compiler_options(capability: tuple[int, int], defines: dict[str, int]) -> list[str]:
    # 'a' unlocks what this chip alone has; there is no such target before 9.0.
    target = "sm_{}{}".format(*capability) + ("a" if capability >= (9, 0) else "")
    return [f"--gpu-architecture={target}", "--std=c++17", *(f"-D{k}={v}" for k, v in sorted(defines.items()))]


def cached_cubin(source: str, options: list[str]) -> bytes:
    """:func:`compile_cubin`, or what it made before on this machine."""
    key = hashlib.sha256(repr((source, options, _compiler_version())).encode()).hexdigest()
    path = _cache_directory() / f"{key}.cubin"
    with contextlib.suppress(OSError):  # not there, or not ours to read
        return path.read_bytes()
    cubin = compile_cubin(source, options)
    try:
        _write(path, cubin)
    except OSError as error:
        _warn_once(path.parent, error)
    return cubin


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, also when several ranks compile at once; readable to whom the umask lets."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _warn_once(directory: Path, error: OSError) -> None:
    if directory in _warned:
        return
    _warned.add(directory)
    logger.warning(
        "%s: kernels cannot be kept there (%s), and are compiled at every start; set HYMBA_KERNEL_CACHE to a "
        "directory that can be written", directory, error.strerror or error,
    )  # fmt: skip


@functools.cache
def _compiler_version() -> tuple[int, int]:
    from cuda.bindings import nvrtc

    return tuple(_checked(nvrtc.nvrtcVersion()))


def _cache_directory() -> Path:
    return Path(os.environ.get("HYMBA_KERNEL_CACHE") or Path.home() / ".cache" / "hymba_train" / "kernels")


@functools.cache
def _libcuda() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    library.cuLaunchKernel.argtypes = [pointer, *[number] * 7, pointer, pointer, pointer]
    library.cuCtxGetCurrent.argtypes = library.cuCtxSetCurrent.argtypes = [pointer]
    return library


def _check_code(code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA driver call failed: error {code}")


def _checked(result: tuple) -> tuple:
    """Values of a cuda-bindings call; raises RuntimeError if it failed."""
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"CUDA call failed: {error!r}")
    return tuple(values)
