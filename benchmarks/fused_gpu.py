"""The fused ops on one GPU: each against float64, then its time against plain torch and torch.compile.

python -m benchmarks.fused_gpu [--seconds 110] [--tune] [--fused-alone] [--only NAME ...]

Widths are Hymba-1.5B's, rows those of a micro-batch of 8192 or 16384 tokens with 128 meta tokens, bf16, documents of
about 1000 tokens. Times are medians of CUDA graph replays with a cold L2. GB/s counts every tensor once (an input read,
an output written). Inputs that are slices of in_proj's output lie in rows as wide as that; ``in_proj's parts`` has them
all at once, with their gradients in one tensor. ``--tune`` tries other block sizes after that, ``--fused-alone`` times
nothing else. What does not fit into ``--seconds`` is left out, and said. Details go to $OUT/fused_gpu.json, if OUT is
set. Single kernels: benchmarks/kernels_gpu.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hymba_train.ops import causal_conv_triton as conv_module
from hymba_train.ops import cross_entropy_triton as loss_module
from hymba_train.ops import normed_average_triton as average_module
from hymba_train.ops import rms_norm_triton, rope_triton, swiglu_triton
from hymba_train.ops.causal_conv import causal_conv_rows
from hymba_train.ops.causal_conv_triton import causal_conv_rows_triton
from hymba_train.ops.cross_entropy import linear_cross_entropy
from hymba_train.ops.cross_entropy_triton import linear_cross_entropy_triton
from hymba_train.ops.gradient_slots import split_columns, split_rows
from hymba_train.ops.group_rms_norm_triton import group_rms_norm_triton
from hymba_train.ops.normed_average import normed_average
from hymba_train.ops.normed_average_triton import normed_average_triton
from hymba_train.ops.rms_norm import add_rms_norm, group_rms_norm, rms_norm
from hymba_train.ops.rope import rope_tables, rotate_heads
from hymba_train.ops.segments import rows_reach
from hymba_train.ops.swiglu import swiglu
from hymba_train.ops.swiglu_triton import swiglu_triton as swiglu_fused

D, E, F, HEADS, KV_HEADS, META, EPS = 1600, 3200, 5504, 25, 5, 128, 1e-6
PARTS = [1600, 320, 640, 3200, 3200]  # q, k, v, x, z
GROUPS = [100, 16, 16]  # dt, B, C
VOCAB, PADDED_VOCAB = 32001, 32128
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}
BACKWARD_KNOBS = ("BACKWARD_VALUES", "BACKWARD_STAGES", "BACKWARD_PROGRAMS")
GRAPH_WARM_UPS = 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # cpu: with TRITON_INTERPRET=1, the check alone


@dataclass
class Case:
    """One op: inputs, the plain and the fused function of them, and bytes a row (forward, backward)."""

    name: str
    make: Callable[[int, torch.dtype], list[Tensor]]
    plain: Callable
    fused: dict[str, Callable]
    row_bytes: tuple[int, int]
    float32: frozenset[int] = frozenset()  # inputs that are float32 whatever the dtype
    flops_per_row: int = 0  # matrix products, forward
    columns: dict[int, slice] = field(default_factory=dict)  # an input's columns that are the op's
    knobs: list[tuple[object, tuple[str, ...], list[tuple[int, ...]]]] = field(default_factory=list)

    def leaves(self, inputs: list[Tensor]) -> list[Tensor]:
        parts = [x[:, self.columns[i]] if i in self.columns else x for i, x in enumerate(inputs)]
        return [x.detach().requires_grad_() for x in parts]


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, device=DEVICE, dtype=torch.float64 if math.prod(shape) < 1e7 else torch.float32)


def documents(rows: int) -> Tensor:
    """Segment ids [4, S] of ``rows`` tokens, documents of 1000 on average (of 20 in the small sizes of the check)."""
    s = (rows - META) // 4
    generator = torch.Generator().manual_seed(1)
    return torch.cumsum((torch.rand(4, s, generator=generator) < (1e-3 if s > 1000 else 5e-2)).long(), 1).to(DEVICE)


def tables(rows: int) -> tuple[Tensor, Tensor]:
    return rope_tables(torch.arange(rows, device=DEVICE), 64, 74534.83)


def conv(function: Callable) -> Callable:
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return function(x, weight, bias, **conv_sizes(x.shape[0]))

    return call


def conv_sizes(rows: int) -> dict:
    if rows not in _reach:
        sizes = dict(num_meta=META, batch=4, seq=(rows - META) // 4, segment_ids=segment_ids(rows))
        _reach[rows] = {**sizes, "reach": rows_reach(*list(sizes.values())[:3], rows, segment_ids(rows), 3, DEVICE)}
    return _reach[rows]


_reach: dict[int, dict] = {}
_ids: dict[int, Tensor] = {}
_tables: dict[int, tuple[Tensor, Tensor]] = {}
_labels: dict[int, Tensor] = {}


def segment_ids(rows: int) -> Tensor:
    if rows not in _ids:
        _ids[rows] = documents(rows)
    return _ids[rows]


def rotation(rows: int) -> tuple[Tensor, Tensor]:
    if rows not in _tables:
        _tables[rows] = tables(rows)
    return _tables[rows]


def labels(rows: int) -> Tensor:
    if rows not in _labels:
        _labels[rows] = torch.randint(0, VOCAB, (rows,), device=DEVICE)
        _labels[rows][::50] = -100
    return _labels[rows]


def parts_plain(projected: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    q, k, v, x, z = projected.split(PARTS, -1)
    rows, cos_sin = projected.shape[0], rotation(projected.shape[0])
    out = causal_conv_rows(x, weight, bias, **conv_sizes(rows))
    pieces = [t for part in (v, z) for t in (part[:META], part[META:])]
    return rotate_heads(q, *cos_sin, HEADS), rotate_heads(k, *cos_sin, KV_HEADS), out, *(p.sigmoid() for p in pieces)


def parts_fused(projected: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    q, k, v, x, z = split_columns(projected, PARTS)
    rows, cos_sin = projected.shape[0], rotation(projected.shape[0])
    out = causal_conv_rows_triton(x, weight, bias, **conv_sizes(rows))
    pieces = [t for part in (v, z) for t in split_rows(part, [META, rows - META])]
    turn = rope_triton.rotate_heads_triton
    return turn(q, *cos_sin, HEADS), turn(k, *cos_sin, KV_HEADS), out, *(p.sigmoid() for p in pieces)


def linear_loss(function: Callable, **kwargs) -> Callable:
    return lambda hidden, weight: function(hidden, weight, labels(hidden.shape[0]), VOCAB, **kwargs)


def conv_inputs(rows: int, dtype: torch.dtype) -> list[Tensor]:
    return [randn(rows, sum(PARTS)), randn(E, 4, scale=0.3), randn(E)]


def cases() -> list[Case]:
    b = 2  # bytes of a bf16 number
    tuned = itertools.product
    norm_knobs = [(rms_norm_triton, BACKWARD_KNOBS, [(16, 3, 5), (16, 2, 6), (16, 1, 6), (32, 3, 6), (32, 1, 6)])]
    average_knobs = [
        (average_module, ("FORWARD_VALUES",), [(16,), (32,), (8,)]),
        (average_module, BACKWARD_KNOBS, [(8, 3, 1), (8, 2, 1), (8, 1, 1), (16, 3, 1), (16, 2, 1), (32, 2, 2)]),
    ]
    conv_knobs = [
        *(
            (conv_module, tuple(f"{pass_}_{name}" for name in ("CHUNK", "CHANNELS", "WARPS", "REGISTERS")), tried)
            for pass_, tried in (
                ("FORWARD", [(64, 128, 1, 128), (64, 256, 2, 128), (64, 64, 1, 64), (128, 64, 1, 64)]),
                ("BACKWARD", [(64, 128, 1, 200), (128, 128, 1, 200), (64, 256, 2, 200), (128, 256, 2, 200),
                              (64, 256, 4, 128), (128, 256, 4, 128), (64, 64, 1, 128)]),
            )
        ),
        (conv_module, ("FINISH_LINES", "FINISH_CHANNELS"), [(32, 32), (64, 32), (128, 32), (64, 64)]),
    ]  # fmt: skip
    rope_knobs = [(rope_triton, ("ROWS", "VALUES_PER_THREAD"), [(2, 8), (1, 8), (4, 8), (2, 4)])]
    loss_knobs = [
        (loss_module, ("FORWARD_BLOCK", "FORWARD_WARPS"), list(tuned([2048, 4096, 8192], [4, 8, 16]))),
        (loss_module, ("BACKWARD_BLOCK", "BACKWARD_WARPS"), list(tuned([1024, 2048, 4096, 8192], [4, 8]))),
    ]
    norm, fused_norm = (lambda x, w: rms_norm(x, w, EPS)), (lambda x, w: rms_norm_triton.rms_norm_triton(x, w, EPS))
    return [
        Case("rms_norm", lambda n, t: [randn(n, D), randn(D)], norm, {"triton": fused_norm},
             (2 * D * b, 3 * D * b), frozenset({1}), knobs=norm_knobs),
        Case("add_rms_norm", lambda n, t: [randn(n, D), randn(n, D), randn(D)],
             lambda r, x, w: add_rms_norm(r, x, w, EPS),
             {"triton": lambda r, x, w: rms_norm_triton.add_rms_norm_triton(r, x, w, EPS)},
             (4 * D * b, 4 * D * b), frozenset({2}), knobs=norm_knobs),
        Case("group_rms_norm", lambda n, t: [randn(n, 132), *(randn(g) for g in GROUPS)],
             lambda x, *w: group_rms_norm(x, w, EPS),
             {"triton": lambda x, *w: group_rms_norm_triton(x, w, EPS)},
             (2 * 132 * b, 3 * 132 * b), frozenset({1, 2, 3})),
        Case("normed_average", lambda n, t: [randn(n, E), randn(n, E), randn(E), randn(E)],
             lambda *x: normed_average(*x, EPS, E), {"triton": lambda *x: normed_average_triton(*x, EPS, E)},
             (3 * E * b, 5 * E * b), frozenset({2, 3}), knobs=average_knobs),
        Case("normed_average, split", lambda n, t: [randn(n, E), randn(n, E), randn(E), randn(E)],
             lambda *x: normed_average(*x, EPS, E, lambda s: None),
             {"triton": lambda *x: normed_average_triton(*x, EPS, E, lambda s: None)},
             (5 * E * b, 8 * E * b), frozenset({2, 3})),
        Case("swiglu", lambda n, t: [randn(n, 2 * F)], swiglu, {"triton": swiglu_fused}, (3 * F * b, 5 * F * b),
             knobs=[(swiglu_triton, ("ROWS", "COLUMNS", "WARPS"), list(tuned([1, 2, 4], [512, 1024], [4, 8])))]),
        Case("conv_rows", conv_inputs, conv(causal_conv_rows), {"triton": conv(causal_conv_rows_triton)},
             (2 * E * b, 3 * E * b), columns={0: slice(2560, 2560 + E)}, knobs=conv_knobs),
        *(Case(f"rope of {name}", lambda n, t: [randn(n, sum(PARTS))],
               lambda x, heads=heads: rotate_heads(x, *rotation(x.shape[0]), heads),
               {"triton": lambda x, heads=heads: rope_triton.rotate_heads_triton(x, *rotation(x.shape[0]), heads)},
               (heads * 256 + 256, heads * 256 + 256), columns={0: slice(first, first + 64 * heads)}, knobs=rope_knobs)
          for name, heads, first in (("q", HEADS, 0), ("k", KV_HEADS, D))),
        Case("in_proj's parts", conv_inputs, parts_plain, {"triton": parts_fused},
             (2 * (D + 320 + E + 640 + E) * b + 320, (2 * (D + 320) + 3 * E + 3 * (640 + E)) * b + 320)),
        Case("linear_cross_entropy", lambda n, t: [randn(n, D), randn(PADDED_VOCAB, D, scale=0.03)],
             linear_loss(linear_cross_entropy),
             {"triton": linear_loss(linear_cross_entropy_triton),
              "triton, recompute": linear_loss(linear_cross_entropy_triton, recompute=True)},
             (2 * PADDED_VOCAB * b, 4 * PADDED_VOCAB * b), flops_per_row=2 * D * PADDED_VOCAB, knobs=loss_knobs),
    ]  # fmt: skip


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
        if name == "triton, recompute":
            saved, loss_module.CHUNK_ROWS = loss_module.CHUNK_ROWS, 100
        torch.manual_seed(0)
        base = case.make(META + (260 if DEVICE == "cuda" else 12), dtype)
        inputs = [x.to(torch.float32 if i in case.float32 else dtype) for i, x in enumerate(base)]
        expected = results(case, case.plain, [x.double() for x in inputs])
        found = results(case, function, inputs)
        errors = [
            ((a.double() - b).norm() / b.norm().clamp(min=1e-6)).item() for a, b in zip(found, expected, strict=True)
        ]
        again = all(torch.equal(a, b) for a, b in zip(found, results(case, function, inputs), strict=True))
        key = f"{name} {str(dtype).removeprefix('torch.')}"
        worst[key] = max(errors) if all(e == e for e in errors) else math.nan
        if not worst[key] <= TOLERANCE[dtype]:
            print(f"WRONG: {case.name}, {key}: {[f'{e:.1e}' for e in errors]}", flush=True)
        if not again:
            print(f"NOT THE SAME BITS TWICE: {case.name}, {key}", flush=True)
        if name == "triton, recompute":
            loss_module.CHUNK_ROWS = saved
    return worst


# -- fast? -------------------------------------------------------------------------------------------------------------


def milliseconds(function: Callable[[], object]) -> tuple[float, bool]:
    """(median of graph replays with a cold L2, True); without a graph, where it cannot be captured, (..., False)."""
    from triton.testing import do_bench

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(GRAPH_WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
    except Exception as error:
        print(f"  no graph: {type(error).__name__} {str(error)[:120]}", flush=True)
        torch.cuda.synchronize()
        return do_bench(function, warmup=5, rep=40, return_mode="median"), False
    found = do_bench(graph.replay, warmup=5, rep=40, return_mode="median")
    del graph
    return found, True


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
    inputs = [
        x.to(torch.float32 if i in case.float32 else torch.bfloat16)
        for i, x in enumerate(case.make(rows, torch.bfloat16))
    ]
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
    inputs = [x.to(torch.float32 if i in case.float32 else torch.bfloat16)
              for i, x in enumerate(case.make(rows, torch.bfloat16))]  # fmt: skip
    tried = []
    for module, names, combinations in case.knobs:
        before = {name: getattr(module, name) for name in names}
        for combination in combinations:
            if time.monotonic() > deadline:
                print(f"  out of time: tuning {case.name}", flush=True)
                break
            settings = dict(zip(names, combination, strict=True))
            for name, value in settings.items():
                setattr(module, name, value)
            try:
                t = both_times(case, function, inputs)
                tried.append((t["both"], t["forward"], settings))
            except Exception as error:
                print(f"  FAILED {case.name} {settings}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        for name, value in before.items():
            setattr(module, name, value)
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
        for both, forward, settings in tried[:10]:
            print(f"   {both:.3f} {forward:.3f} {settings}")
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
