"""``hymba bench scan``: the selective scan at Hymba-1.5B's sizes on one GPU, every backend checked, then timed.

3,200 channels, 16 states, bf16 activations that are slices of wider rows, B and C float32. All kernels are compiled
first, side by side. Checks against the torch backend come next; then the median time of the forward and of forward and
backward (CUDA events, inputs rotated so that none is still in the cache), the time of each kernel, and host time.
--settings times the CUDA backend under other block sizes, too; --before beside it an older selective_scan_cuda.py.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hymba_train.bench.timing import need_gpu, profiled_kernels, settings
from hymba_train.errors import UserError
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
        Variant("triton", "triton"),
        *([Variant("mamba_ssm", "mamba_ssm")] if importlib.util.find_spec("mamba_ssm") else []),
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
    with ProcessPoolExecutor(min(len(jobs) or 1, os.cpu_count()), multiprocessing.get_context("spawn")) as pool:
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
    """Relative error (2-norm) of every result; the torch backend in float64, at a model's sizes in float32."""
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


def kernel_times(run: Callable[[int], Any]) -> dict[str, float]:
    """Microseconds of each kernel in one call."""
    averages = profiled_kernels(lambda: [run(i) for i in range(6)])
    return {e.key[:40]: round(e.device_time_total / 6, 1) for e in averages}


def measure(variant: Variant, batch: int, tokens: int, packed: bool, seconds: float) -> dict[str, Any]:
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
        result["kernels_us"] = kernel_times(both)
        result["host_us"], result["host_forward_us"] = host_time(both), host_time(forward)
        before = torch.cuda.memory_allocated()
        held = forward(0)
        result["saved_mib"] = round((torch.cuda.memory_allocated() - before) / 2**20, 1)
        del held
    return result


def main(argv: Sequence[str]) -> int:
    """Returns 0, or 1 if a variant is wrong or could not run. Raises UserError without a GPU."""
    parser = argparse.ArgumentParser(prog="hymba bench scan", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the rows of the table")
    parser.add_argument("--settings", action="store_true", help="other block sizes of the CUDA backend, too")
    parser.add_argument(
        "--before", type=Path, metavar="DIR", help="folder of an older selective_scan_cuda.py and cuda/"
    )
    parser.add_argument("--seconds", type=float, default=0.05, help="at least, of each timing")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="what does not fit is left out")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.parse_args(argv)
    need_gpu("scan")
    deadline = time.monotonic() + args.timeout
    torch.backends.cuda.matmul.allow_tf32 = False
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "checks": {}, "times": [], "problems": []
    }  # fmt: skip
    chosen = [
        v for v in variants(args.before) if (v.name in args.only if args.only else args.settings or not v.settings)
    ]
    unknown = set(args.only or ()) - {v.name for v in chosen}
    if unknown:
        raise UserError(
            f"hymba bench scan: no {', '.join(unknown)}; there are {[v.name for v in variants(args.before)]}"
        )
    compile_all(chosen)
    good = check_all(chosen, report)
    print(f"{report['device']}  torch {torch.__version__}", HEADER, sep="\n", flush=True)
    for size, v, packed in itertools.product(SIZES, chosen, (False, True)):
        if v.name not in good or (v.sizes and size not in v.sizes) or (packed and v.name != "cuda"):
            continue
        if time.monotonic() > deadline:
            report["problems"].append(f"{v.name} {size}: out of time")
            continue
        try:
            found = measure(v, *size, packed, args.seconds)
        except Exception as error:  # one variant's failure must not lose the others' figures
            report["problems"].append(f"{v.name} {size}: {type(error).__name__}: {str(error)[:300]}")
            continue
        finally:
            torch.cuda.empty_cache()
        report["times"].append({"variant": v.name, "size": size, "packed": packed, "ok": good[v.name], **found})
        print(line(report["times"][-1]), flush=True)
    print(*report["problems"], sep="\n")
    if args.output:
        args.output.write_text(json.dumps(report, indent=1))
    wrong = [v.name for v in chosen if v.backend != "mamba_ssm" and not good.get(v.name)]
    return int(bool(wrong or report["problems"]))


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
        if not v.sizes and v.backend == "cuda":
            cases = [*cases, ((4, 2048, CHANNELS), torch.bfloat16, not v.settings, 1e-2)]
        for size, dtype, packed, limit in cases:
            try:
                errors = check(v, *size, dtype, packed and v.backend != "mamba_ssm")
            except Exception as error:
                report["problems"].append(f"{v.name}: left out: {type(error).__name__}: {str(error)[:300]}")
                good.pop(v.name, None)
                break
            torch.cuda.empty_cache()
            ok = all(e < limit for e in errors.values())  # NaN is not good
            good[v.name] = good.get(v.name, True) and ok
            report["checks"].setdefault(v.name, []).append(errors)
            worst = max(errors, key=lambda k: errors[k] if errors[k] == errors[k] else 1e9)
            print(f"{v.name} {size}: worst {worst} {errors[worst]:.1e} {'ok' if ok else 'WRONG'}", flush=True)
    return good


HEADER = f"{'':37} {'kernel, us':>15}  {'whole, us':>15}  {'host, us':>13}  {'kept':>6}\n" + (
    f"{'B x S':>10} {'variant':<26} {'fwd':>7} {'bwd':>7}  {'fwd':>7} {'bwd':>7}  {'fwd':>6} {'both':>6}  {'MiB':>6}"
)


def line(row: dict[str, Any]) -> str:
    """Of the table: the scan's kernels alone, all that a forward and a backward do, by events, and the host's time."""
    name = row["variant"] + (" packed" if row["packed"] else "") + ("" if row["ok"] else " WRONG")
    forward, backward = (row["kernels_us"].get(f"scan_{way}", float("nan")) for way in ("forward", "backward"))
    all_forward, all_backward = 1e3 * row["forward_ms"], 1e3 * (row["both_ms"] - row["forward_ms"])
    return (
        f"{row['size'][0]:>3} x {row['size'][1]:<4} {name:<26} {forward:7.1f} {backward:7.1f}  {all_forward:7.0f} "
        f"{all_backward:7.0f}  {row['host_forward_us']:6.0f} {row['host_us']:6.0f}  {row['saved_mib']:6.0f}"
    )
