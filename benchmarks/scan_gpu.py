"""Selective scan at Hymba's sizes on one GPU: every variant checked, then timed.

``python -m benchmarks.scan_gpu [--out DIR] [--budget SECONDS] [--only NAME,...] [--before DIR] [--more] [--once]``:
3,200 channels, 16 states, bf16 activations that are slices of wider rows, B and C float32. All kernels are compiled
first, side by side. Checks against the reference come next; then the median time of the forward and of forward and
backward (CUDA events, inputs rotated so that none is still in the cache), the time of each kernel, and host time.
``--before``: the folder of an older selective_scan_cuda.py and its cuda/, timed beside. Results go to
DIR/scan_gpu.json; the tables are printed last.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_timing import profiled_kernels, settings
from hymba_train.ops import nvrtc
from hymba_train.ops import selective_scan as plain
from hymba_train.ops import selective_scan_cuda as cuda_scan
from hymba_train.ops.registry import BACKENDS

CHANNELS, STATES = 3200, 16
SIZES = [(4, 2048), (8, 2048), (12, 2048), (2, 8192)]
RESULTS = ("y", "final", "u", "dt", "A_log", "B", "C", "D", "bias", "z", "initial")


@dataclass
class Variant:
    """A backend under some settings: names of the cuda backend's module, BUILD's entries among them."""

    name: str
    backend: str = "cuda"
    settings: dict[str, Any] = field(default_factory=dict)
    module: ModuleType = cuda_scan
    sizes: list[tuple[int, int]] | None = None
    more: bool = False  # only if asked for

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        build = getattr(self.module, "BUILD", {})
        changed = {k: v for k, v in self.settings.items() if k not in build}
        if build:
            changed["BUILD"] = build | {k: v for k, v in self.settings.items() if k in build}
        with settings(self.module, changed):
            yield


def variants(before: Path | None = None) -> list[Variant]:
    """The backward's settings have nothing to do with the forward's: a variant changes both, to save time."""
    chain, square = lambda f, b: {"CHAIN_TOKENS": {"forward": f, "backward": b}}, SIZES[:3]
    return [
        Variant("cuda"),
        Variant("F 5 blocks, B chain 256", settings=chain(256, 256) | {"FORWARD_BLOCKS": 5}),
        Variant("F chain 128, B window 4", settings=chain(128, 128) | {"BACKWARD_WINDOW": 4, "BACKWARD_BLOCKS": 2}),
        Variant("F 6 blocks, B 2 blocks", settings={"FORWARD_BLOCKS": 6, "BACKWARD_BLOCKS": 2}),
        Variant("F unroll 16, B hold 1", settings={"FORWARD_UNROLL": 16, "HOLD_UNROLL": 1}),
        Variant("F, B one chunk", settings={"CHUNKS": cuda_scan.Chunks(2048, 1, False)}, sizes=square),
        *([Variant("before", module=_load(before))] if before else []),
        Variant("mamba_ssm", "mamba_ssm", more=True),
        Variant("triton", "triton", more=True),
    ]


def _load(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("scan_before", folder / "selective_scan_cuda.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["scan_before"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


BUILDS = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
"""(dtype of the activations, exact) that the checks and timings need, B and C being float32."""


def compile_all(chosen: list[Variant]) -> None:
    """All kernels into the cache on disk, on as many cores as there are."""
    capability = torch.cuda.get_device_capability()
    jobs = {}
    for v in chosen:
        if v.backend != "cuda":
            continue
        with v.active():
            source = v.module.source()
            for x_dtype, exact in BUILDS[-1:] if v.settings else BUILDS:
                options = nvrtc.compiler_options(capability, v.module.defines(x_dtype, torch.float32, exact))
                jobs[source, tuple(options)] = (source, options)
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count()), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(nvrtc.cached_cubin, *zip(*jobs.values(), strict=True)))


def make(batch: int, tokens: int, dtype: torch.dtype, seed: int, channels: int = CHANNELS) -> list[Tensor]:
    """u, dt, A_log, B, C, D, dt_bias, z, initial state. u, dt and z are slices of rows twice as wide."""
    g = torch.Generator(device="cuda").manual_seed(seed)

    def r(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device="cuda")

    wide = [r(batch, tokens, 2 * channels).to(dtype) for _ in range(2)]
    u, z = torch.nn.functional.silu(wide[0][..., :channels]), wide[0][..., channels:]
    dt = (0.7 * wide[1])[..., :channels]
    A_log = torch.arange(1, STATES + 1, device="cuda").float().log() + 0.2 * r(channels, STATES)
    delta = torch.exp(torch.rand(channels, generator=g, device="cuda") * 4.6 - 6.9)  # 1e-3 to 0.1
    bias = delta + torch.log(-torch.expm1(-delta))
    B, C = r(batch, tokens, STATES), r(batch, tokens, STATES)
    return [u, dt, A_log, B, C, 1 + 0.1 * r(channels), bias, z, 0.3 * r(channels, STATES)]


def make_documents(batch: int, tokens: int) -> Tensor:
    """About 4 documents a row of 2048."""
    g = torch.Generator(device="cuda").manual_seed(5)
    return torch.cumsum((torch.rand(batch, tokens, generator=g, device="cuda") < 4 / 2048).long(), 1)


def function(variant: Variant) -> Callable[..., tuple[Tensor, Tensor]]:
    if variant.module is not cuda_scan:
        return variant.module.selective_scan_cuda
    if variant.backend != "mamba_ssm":
        backend = next(b for b in BACKENDS["selective_scan"] if b.name == variant.backend)
        obstacles = backend.obstacles("cuda", (), torch.bfloat16)
        if obstacles:
            raise RuntimeError("; ".join(obstacles))
        return backend.function
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def mamba(u, dt, A_log, B, C, D, bias, z, *, initial_state=None, segment_ids=None):
        # Its layout is [B, C, S]: the inputs come in it (views), so that it is timed without any transpose.
        u, dt, z, B, C = (x.to(u.dtype).transpose(1, 2) for x in (u, dt, z, B, C))
        y, state = selective_scan_fn(
            u, dt, -torch.exp(A_log), B, C, D, z=z, delta_bias=bias, delta_softplus=True, return_last_state=True
        )
        return y.transpose(1, 2), state

    return mamba


def gradients(fn, tensors: list[Tensor], ids: Tensor | None, dy: Tensor, d_final: Tensor | None) -> list[Tensor]:
    given = [x.detach().requires_grad_() for x in tensors]
    y, final = fn(*given[:8], initial_state=given[8] if len(given) > 8 else None, segment_ids=ids)
    total = (y * dy.to(y)).sum() if d_final is None else (y * dy.to(y)).sum() + (final * d_final.to(final)).sum()
    return [y.detach(), final.detach(), *torch.autograd.grad(total, given)]


def check(
    variant: Variant, batch: int, tokens: int, channels: int, dtype: torch.dtype, packed: bool
) -> dict[str, float]:
    """Relative error (2-norm) of every result; the reference runs in float64, at the sizes of a model in float32."""
    tensors = make(batch, tokens, dtype, int(time.time() * 1e6) % 2**31, channels)
    ids = make_documents(batch, tokens) if packed else None
    dy = torch.randn(batch, tokens, channels, device="cuda").to(dtype)
    d_final = torch.randn(batch, channels, STATES, device="cuda")
    if variant.backend == "mamba_ssm":
        tensors, d_final = tensors[:8], None
    exact = torch.float64 if channels < CHANNELS else torch.float32
    want = gradients(plain.selective_scan, [x.to(exact) for x in tensors], ids, dy.to(exact), d_final)
    with variant.active():
        found = gradients(function(variant), tensors, ids, dy, d_final)
    errors = ((a.double() - b.double()).norm() / b.double().norm() for a, b in zip(found, want, strict=True))
    return {name: error.item() for name, error in zip(RESULTS, errors, strict=False)}


def timed(run: Callable[[int], Any], seconds: float) -> float:
    """Median milliseconds of run(i). The GPU is kept busy while calls are queued, so host time does not count."""
    for i in range(4):
        run(i)
    torch.cuda.synchronize()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 6:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(9)]
        torch.cuda._sleep(20_000_000)
        for i in range(8):
            events[i].record()
            run(i)
        events[8].record()
        torch.cuda.synchronize()
        times += [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return statistics.median(times)


def host_time(run: Callable[[int], Any]) -> float:
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    start = time.perf_counter()
    for i in range(10):
        run(i)
    taken = (time.perf_counter() - start) / 10
    torch.cuda.synchronize()
    return 1e6 * taken


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        ctx.shapes = [x.shape for x in inputs]
        return inputs[0].new_empty(inputs[0].shape)

    @staticmethod
    def backward(ctx, gradient):
        return tuple(gradient.new_empty(shape) for shape in ctx.shapes)


def empty_host_time() -> float:
    """What PyTorch itself takes, to compare with the host time of a scan."""
    given = [torch.zeros(64, device="cuda", requires_grad=True) for _ in range(9)]
    weight = torch.ones(64, device="cuda")
    return host_time(lambda i: torch.autograd.grad(_Nothing.apply(*given), given, weight))


def kernel_times(run: Callable[[int], Any]) -> dict[str, float]:
    """Microseconds of each kernel in one call."""
    averages = profiled_kernels(lambda: [run(i) for i in range(6)])
    return {e.key[:40]: round(e.device_time_total / 6, 1) for e in averages}


def measure(variant: Variant, batch: int, tokens: int, packed: bool, seconds: float, deep: bool) -> dict[str, Any]:
    fn, sets = function(variant), 2 if batch * tokens > 8192 else 4
    ids = make_documents(batch, tokens) if packed else None
    inputs = []
    for k in range(sets):
        tensors = make(batch, tokens, torch.bfloat16, k)
        if variant.backend == "mamba_ssm":  # its own layout; B and C bf16 as it wants them; no initial state
            for i in (0, 1, 7):
                tensors[i] = tensors[i].transpose(1, 2).contiguous().transpose(1, 2)
            tensors[3:5] = [x.bfloat16().transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[3:5]]
        inputs.append([x.detach().requires_grad_() for x in tensors])
    dys = [torch.randn(batch, tokens, CHANNELS, device="cuda").bfloat16() for _ in range(sets)]
    if variant.backend == "mamba_ssm":
        dys = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in dys]

    def forward(i: int):
        given = inputs[i % sets]
        initial = None if variant.backend == "mamba_ssm" else given[8]
        return fn(*given[:8], initial_state=initial, segment_ids=ids)

    def both(i: int):
        given = inputs[i % sets][: 8 if variant.backend == "mamba_ssm" else 9]
        return torch.autograd.grad(forward(i)[0], given, dys[i % sets])

    with variant.active():
        result = {"forward_ms": timed(forward, seconds), "both_ms": timed(both, seconds)}
        if deep:
            result["kernels_us"] = kernel_times(both)
        else:
            result["host_us"], result["host_forward_us"] = host_time(both), host_time(forward)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        held = forward(0)
        result["saved_mib"] = round((torch.cuda.memory_allocated() - before) / 2**20, 1)
        del held
    return result


def run_once(name: str) -> None:
    """Three forwards and backwards at 4 x 2048; the second is the one to look at."""
    variant = next(v for v in variants() if v.name == name)
    given = [x.detach().requires_grad_() for x in make(4, 2048, torch.bfloat16, 0)]
    dy = torch.randn(4, 2048, CHANNELS, device="cuda").bfloat16()
    with variant.active():
        for _ in range(3):
            torch.autograd.grad(function(variant)(*given[:8], initial_state=given[8])[0], given, dy)
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--budget", type=float, default=60.0, help="seconds; what does not fit is left out and said")
    parser.add_argument("--seconds", type=float, default=0.05, help="at least, of each timing")
    parser.add_argument("--before", type=Path, help="folder of an older selective_scan_cuda.py")
    parser.add_argument("--only", default="", help="names of variants, comma-separated")
    parser.add_argument("--more", action="store_true", help="other backends too")
    parser.add_argument("--once", action="store_true", help="a few calls at 4 x 2048 and no timing: for a profiler")
    args = parser.parse_args()
    if args.once:
        run_once(args.only or "cuda")
        return
    begin = time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.cuda.get_device_name()
    report: dict[str, Any] = {"device": device, "torch": torch.__version__, "checks": {}, "times": []}
    chosen = [
        v for v in variants(args.before) if (v.name in args.only.split(",") if args.only else args.more or not v.more)
    ]
    compile_all(chosen)
    print(f"{device}, torch {torch.__version__}; compiled after {time.perf_counter() - begin:.0f} s", flush=True)
    good = check_all(chosen, report)
    for size in SIZES:
        for v in chosen:
            for packed in (False, True):
                if v.name not in good or (v.sizes and size not in v.sizes) or (packed and v.name != "cuda"):
                    continue
                if time.perf_counter() - begin > args.budget:
                    print(f"out of time: {v.name} {size} left out", flush=True)
                    continue
                try:
                    result = measure(v, *size, packed, args.seconds, deep=not packed)
                except Exception as error:
                    print(f"{v.name} {size}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                    continue
                finally:
                    torch.cuda.empty_cache()
                entry = {"variant": v.name, "size": size, "packed": packed, "ok": good[v.name], **result}
                report["times"].append(entry)
                print(f"{v.name} {size}: {result.get('kernels_us', '')}", flush=True)
    (Path(args.out) / "scan_gpu.json").write_text(json.dumps(report, indent=1))
    print_tables(report)
    print(f"host us of an autograd function that does nothing, 9 inputs, forward + backward: {empty_host_time():.0f}")
    print(f"{device}; {time.perf_counter() - begin:.0f} s")


CHECKS = [
    ((2, 700, 64), torch.bfloat16, True, 1e-2),
    ((3, 517, 131), torch.bfloat16, False, 1e-2),
    ((2, 300, 200), torch.float32, True, 2e-5),
]
"""Size, type, documents, and how far a result may be off; variants of the default are held to the first and to 4 x 2048
tokens of a model."""


def check_all(chosen: list[Variant], report: dict[str, Any]) -> dict[str, bool]:
    """Are all results of a variant right? Without those that could not run."""
    good: dict[str, bool] = {}
    for v in chosen:
        cases = CHECKS[:1] if v.settings else CHECKS
        if not (v.sizes or v.more):
            cases = [*cases, ((4, 2048, CHANNELS), torch.bfloat16, not v.settings, 1e-2)]
        for size, dtype, packed, limit in cases:
            try:
                errors = check(v, *size, dtype, packed and v.backend != "mamba_ssm")
            except Exception as error:
                print(f"{v.name}: left out: {type(error).__name__}: {str(error)[:300]}", flush=True)
                good.pop(v.name, None)
                break
            torch.cuda.empty_cache()
            ok = all(e < limit for e in errors.values())  # NaN is not good
            good[v.name] = good.get(v.name, True) and ok
            report["checks"].setdefault(v.name, []).append(errors)
            worst = max(errors, key=lambda k: errors[k] if errors[k] == errors[k] else 1e9)
            print(f"{v.name} {size}: worst {worst} {errors[worst]:.1e} {'ok' if ok else 'WRONG'}", flush=True)
    return good


def print_tables(report: dict[str, Any]) -> None:
    """Microseconds of the kernels of a forward and of a backward, and of the whole by events."""
    print(f"\n{'B x S':>9} {'variant':<26} {'forward':>8} {'backward':>8} {'all fwd':>8} {'all bwd':>8} {'MiB':>6}")
    for t in report["times"]:
        name = t["variant"] + (" packed" if t["packed"] else "") + ("" if t["ok"] else " WRONG")
        kernels = t.get("kernels_us", {})
        forward, backward = (kernels.get(f"scan_{way}", float("nan")) for way in ("forward", "backward"))
        all_forward, all_backward = 1e3 * t["forward_ms"], 1e3 * (t["both_ms"] - t["forward_ms"])
        print(
            f"{t['size'][0]:>3} x {t['size'][1]:<4} {name:<26} {forward:8.1f} {backward:8.1f} "
            f"{all_forward:8.0f} {all_backward:8.0f} {t['saved_mib']:6.0f}"
        )
    for t in report["times"]:
        if "host_us" in t:
            print(f"host us at {t['size']}: forward {t['host_forward_us']:.0f}, and backward {t['host_us']:.0f}")


if __name__ == "__main__":
    main()
