"""The fused ops on one GPU: each against float64, then its time against plain torch and torch.compile.

python -m benchmarks.fused_gpu [--seconds 110] [--tune] [--fused-alone] [--only NAME ...]

Widths are Hymba-1.5B's, rows those of a micro-batch of 8192 or 16384 tokens with 128 meta tokens, bf16, documents of
about 1000 tokens. Times are medians of CUDA graph replays with a cold L2. GB/s counts every tensor once (an input read,
an output written). Inputs that are slices of in_proj's output lie in rows as wide as that; ``in_proj's parts`` has them
all at once, with their gradients in one tensor. ``--tune`` tries other block sizes after that, ``--fused-alone`` times
nothing else. What does not fit into ``--seconds`` is left out, and said. Details go to $OUT/fused_gpu.json, if OUT is
set. The ops: benchmarks/fused_cases.py; single kernels: benchmarks/kernels_gpu.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.fused_cases import DEVICE, META, Case, cases
from benchmarks.gpu_timing import milliseconds
from hymba_train.bench.timing import settings
from hymba_train.ops import cross_entropy_triton as loss_module

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}


# -- right? ------------------------------------------------------------------------------------------------------------


def results(case: Case, function: Callable, inputs: list[Tensor], seeds: int = 7) -> list[Tensor]:
    leaves = case.leaves(inputs)
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator(DEVICE).manual_seed(seeds)
    upstream = [torch.randn(o.shape, generator=generator, device=DEVICE, dtype=torch.float32).to(o.dtype) for o in out]
    return [*out, *torch.autograd.grad(out, leaves, upstream)]


def check(case: Case) -> dict[str, float]:
    """Largest relative error of outputs and gradients, float32 and bf16, 260 + META rows, against float64."""
    worst = {}
    for (name, function), dtype in itertools.product(case.fused.items(), TOLERANCE):
        torch.manual_seed(0)
        inputs = case.inputs(META + (260 if DEVICE == "cuda" else 12), dtype)
        expected = results(case, case.plain, [x.double() for x in inputs])
        with settings(loss_module, {"CHUNK_ROWS": 100} if name == "triton, recompute" else {}):
            found, second = (results(case, function, inputs) for _ in range(2))
        errors = [
            ((a.double() - b).norm() / b.norm().clamp(min=1e-6)).item() for a, b in zip(found, expected, strict=True)
        ]
        again = all(torch.equal(a, b) for a, b in zip(found, second, strict=True))
        key = f"{name} {str(dtype).removeprefix('torch.')}"
        worst[key] = max(errors) if all(e == e for e in errors) else math.nan
        if not worst[key] <= TOLERANCE[dtype]:
            print(f"WRONG: {case.name}, {key}: {[f'{e:.1e}' for e in errors]}", flush=True)
        if not again:
            print(f"NOT THE SAME BITS TWICE: {case.name}, {key}", flush=True)
    return worst


# -- fast? -------------------------------------------------------------------------------------------------------------


def both_times(case: Case, function: Callable, inputs: list[Tensor]) -> dict[str, float]:
    """ms forward alone, and forward with backward."""
    leaves = case.leaves(inputs)
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    upstream = [torch.randn_like(o) for o in out]
    del out

    def forward() -> object:
        with torch.no_grad():
            return function(*leaves)

    def whole() -> object:
        out = function(*leaves)
        return torch.autograd.grad(out if isinstance(out, tuple) else (out,), leaves, upstream)

    (f, captured), (fb, also) = milliseconds(forward), milliseconds(whole)
    return {"forward": f, "both": fb, "graph": captured and also}


def time_case(case: Case, rows: int, deadline: float, compiled: bool, plain: bool = True) -> dict[str, dict]:
    inputs = case.inputs(rows, torch.bfloat16)
    contenders = {"compiled": torch.compile(case.plain, dynamic=False)} if compiled else dict(case.fused)
    if plain and not compiled:
        contenders["plain"] = case.plain
    found = {}
    for name, function in contenders.items():
        if time.monotonic() > deadline:
            print(f"  out of time: {case.name}, {rows} rows, {name}", flush=True)
            continue
        try:
            found[name] = both_times(case, function, inputs)
        except Exception as error:
            print(f"  FAILED {case.name} {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        torch.cuda.empty_cache()
    return found


def tune(case: Case, rows: int, deadline: float) -> list[tuple[float, float, dict]]:
    """(forward + backward ms, forward ms, settings) of every combination of a group of knobs, others as they are."""
    function = case.fused["triton"]
    inputs, tried = case.inputs(rows, torch.bfloat16), []
    for module, names, combinations in case.knobs:
        for combination in combinations:
            if time.monotonic() > deadline:
                print(f"  out of time: tuning {case.name}", flush=True)
                break
            values = dict(zip(names, combination, strict=True))
            try:
                with settings(module, values):
                    t = both_times(case, function, inputs)
                tried.append((t["both"], t["forward"], values))
            except Exception as error:
                print(f"  FAILED {case.name} {values}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    return sorted(tried, key=lambda x: x[0])


def copy_bandwidth() -> float:
    """TB/s of a device copy, read plus written."""
    a = torch.randn(2**29, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / milliseconds(lambda: b.copy_(a))[0] / 1e9


def row(case: Case, rows: int, times: dict[str, dict], peak: float) -> str:
    text = f"{case.name:22s} {rows:6d} "
    for name in [*case.fused, "plain", "compiled"]:
        t = times.get(name)
        label = name if name.startswith("triton, ") else ""
        text += (
            f"| {label}{t['forward']:7.3f} {t['both']:7.3f}{'' if t['graph'] else '*'} " if t else "|       -       - "
        )
    fused = times.get("triton")
    if fused:
        forward, both = (rows * x / 1e9 for x in (case.row_bytes[0], sum(case.row_bytes)))
        rates = forward / fused["forward"], both / fused["both"]
        text += f"| {rates[0]:5.2f} {rates[1]:5.2f} TB/s = {100 * rates[1] / peak:3.0f} % of copy"
        if case.flops_per_row:
            text += f", {3 * rows * case.flops_per_row / fused['both'] / 1e9:.0f} TFLOP/s"
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=110)
    parser.add_argument("--tune", action="store_true", help="try other block sizes in the time that is left")
    parser.add_argument("--fused-alone", action="store_true", help="time neither plain torch nor torch.compile")
    parser.add_argument("--only", nargs="*", help="names of ops")
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192, 16384])
    given = parser.parse_args(arguments)
    deadline = time.monotonic() + given.seconds
    on_gpu = DEVICE == "cuda"
    device, peak = (torch.cuda.get_device_name(), copy_bandwidth()) if on_gpu else ("cpu", 1.0)
    chosen = [c for c in cases() if not given.only or c.name in given.only]
    report: dict = {"device": device, "torch": torch.__version__, "copy_tb_per_s": peak, "ops": {}, "errors": {}}
    report["tuned"] = {}
    sizes = [tokens + META for tokens in given.tokens]

    def save() -> None:
        if os.environ.get("OUT"):
            with open(os.path.join(os.environ["OUT"], "fused_gpu.json"), "w") as file:
                json.dump(report, file, indent=1)

    working = []
    for case in chosen:
        try:
            report["errors"][case.name] = check(case)
            working.append(case)
        except Exception as error:
            print(f"FAILED check of {case.name}: {type(error).__name__}: {str(error)[:600]}", flush=True)
        save()
    print(f"checks done after {given.seconds - deadline + time.monotonic():.0f} s", flush=True)
    for compiled in ((False,) if given.fused_alone else (False, True)) if on_gpu else ():
        for case, rows in itertools.product(working, sizes):
            times = report["ops"].setdefault(case.name, {}).setdefault(rows, {})
            if compiled and (rows != sizes[-1] or case.name == "linear_cross_entropy"):
                continue  # torch.compile at the larger size alone: its compilation takes most of the time
            times.update(time_case(case, rows, deadline, compiled, not given.fused_alone))
            save()
    if given.tune and on_gpu:
        for case in working:
            if case.knobs:
                report["tuned"][case.name] = tune(case, sizes[-1], deadline)
                save()
    for name, tried in report["tuned"].items():
        print(f"{name}: both, forward ms")
        for both, forward, values in tried[:10]:
            print(f"   {both:.3f} {forward:.3f} {values}")
        best = min(tried, key=lambda x: x[1], default=None)
        if best:
            print(f"   best forward {best[1]:.3f} {best[2]}")
    print(f"\n{device}, torch {torch.__version__}, copy {peak:.2f} TB/s. Largest relative errors (norms) vs. float64:")
    for name, errors in report["errors"].items():
        print(f"  {name:22s} " + "  ".join(f"{k} {v:.1e}" for k, v in errors.items()))
    fused_names = " ".join(dict.fromkeys(n for c in chosen for n in c.fused))
    print(f"\nms forward, forward + backward: {fused_names} | plain | torch.compile")
    for case, rows in itertools.product(working, sizes):
        print(row(case, rows, report["ops"].get(case.name, {}).get(rows, {}), peak))


if __name__ == "__main__":
    main()
