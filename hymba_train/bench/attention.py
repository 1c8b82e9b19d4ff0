"""``hymba bench attention``: attention backends on one GPU, one layer of Hymba-1.5B.

Forward, forward + backward, TFLOP/s on visible pairs. bf16, 25 query heads of 64, 5 KV heads, values 128 wide,
128 meta tokens, window 1024 or none. CUDA-event timings of a full queue; inputs rotate through three
sets.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from hymba_train.describe.flops import visible_keys
from hymba_train.ops.registry import BACKENDS
from hymba_train.ops.segments import document_ends

H, G, DK, DV, M, W = 25, 5, 64, 128, 128, 1024
CASES = [  # batch, sequence, window, documents a row
    (4, 2048, W, 1),
    (4, 2048, None, 1),
    (8, 2048, W, 1),
    (4, 2048, W, 4),
    (1, 8192, W, 1),
    (1, 8192, None, 1),
]


def inputs(batch: int, seq: int) -> list[torch.Tensor]:
    shapes = [(batch, seq, H, DK), (batch, seq, G, DK), (batch, seq, G, DV), (M, H, DK), (M, G, DK), (M, G, DV)]
    return [torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in shapes]


def flops(batch: int, seq: int, window: int | None, documents: int) -> float:
    """Forward, on visible pairs of [meta | document] each, the meta tokens' own work once."""
    meta_pairs = visible_keys(M, None, 0)
    pairs = documents * (visible_keys(M + seq // documents, window, M) - meta_pairs)
    return 2 * (DK + DV) * H * (batch * pairs + meta_pairs)


def milliseconds(run, sets: list, repeats: int = 12) -> float:
    """Of one ``run``, in a queue of them that the host fills ahead of the device."""
    for tensors in sets:
        run(tensors)
    torch.cuda.synchronize()
    busy = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(40):  # some 50 ms of work, so that the queue below is full when its first call starts
        busy @ busy
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for i in range(repeats):
        run(sets[i % len(sets)])
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def measure(backend, batch: int, seq: int, window: int | None, documents: int) -> dict:
    sets = [inputs(batch, seq) for _ in range(3)]
    options = dict(window=window, scale=DK**-0.5)
    if documents > 1:
        ids = (torch.arange(seq) // (seq // documents)).expand(batch, -1).contiguous()
        options |= dict(segment_ids=ids.cuda(), document_ends=document_ends(ids, 32).cuda())
    grad = torch.randn(batch, seq, H, DV, device="cuda", dtype=torch.bfloat16)
    grad_meta = torch.randn(M, H, DV, device="cuda", dtype=torch.bfloat16)

    def forward(tensors):
        with torch.no_grad():
            backend.function(*tensors, **options)

    def both(tensors):
        torch.autograd.grad(backend.function(*tensors, **options), tensors, (grad, grad_meta))

    one, two = milliseconds(forward, sets), milliseconds(both, sets)
    work = flops(batch, seq, window, documents)
    return dict(
        backend=backend.name, batch=batch, seq=seq, window=window, documents=documents, forward_ms=one, both_ms=two,
        forward_tflops=work / one / 1e9, both_tflops=3 * work / two / 1e9,
    )  # fmt: skip


def tune_meta_kernels() -> list[dict]:
    """Milliseconds of both kernels of the meta prefix by rows of a block, blocks of a program and warps."""
    from hymba_train.ops import attention_cudnn as module

    batch, seq = 8, 2048
    random = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    q, out, d_out, d_q = random(batch, seq, H, DK), random(batch, seq, H, DV), random(batch, seq, H, DV), None
    meta_k, meta_v, lse = random(M, G, DK), random(M, G, DV), torch.rand(batch, H, seq, 1, device="cuda") + 5
    d_q, merged, merged_lse = torch.zeros_like(q), torch.empty_like(out), torch.empty_like(lse)
    launch = module.MetaLaunch.of(q, meta_k, meta_v, lse, DK**-0.5)
    saved, rows = (module.ROWS, module.BLOCKS, module.WARPS), []
    print("meta kernels, 8 x 2048:  rows blocks warps   merge ms  backward ms")
    for sizes in [(64, 8, 4), (64, 8, 8), (128, 4, 8), (128, 4, 4), (64, 4, 8), (64, 16, 8), (32, 16, 4), (32, 8, 4)]:
        module.ROWS, module.BLOCKS, module.WARPS = sizes
        row = dict(backend="meta kernels", sizes=sizes)
        try:
            row["merge_ms"] = milliseconds(
                lambda _: launch.merge(q, meta_k, meta_v, out, lse, merged, merged_lse), [None]
            )
            row["backward_ms"] = milliseconds(
                lambda _: launch.backward(q, meta_k, meta_v, out, d_out, lse, d_q), [None]
            )
            print(f"{'':24} {sizes[0]:5} {sizes[1]:6} {sizes[2]:5} {row['merge_ms']:10.3f} {row['backward_ms']:12.3f}")
        except Exception as error:  # a size that does not fit the chip
            row["error"] = repr(error)[:200]
            print(f"{'':24} {sizes} {row['error']}")
        rows.append(row)
    module.ROWS, module.BLOCKS, module.WARPS = saved
    return rows


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="hymba bench attention", description=__doc__)
    names = [backend.name for backend in BACKENDS["attention"] if "cuda" in backend.device_types]
    parser.add_argument("--backends", nargs="+", choices=names, default=[n for n in names if n != "torch"])
    parser.add_argument("--tune", action="store_true", help="time the meta prefix's kernels at other block sizes")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.parse_args(argv)
    rows = []
    for case in CASES:
        for backend in BACKENDS["attention"]:
            if backend.name in args.backends:
                try:
                    rows.append(measure(backend, *case))
                except Exception as error:  # one backend's failure must not lose the other's figures
                    rows.append(dict(backend=backend.name, error=f"{case}: {error!r}"[:400]))
    print(f"{torch.cuda.get_device_name()}  torch {torch.__version__}")
    print("backend   B     S  window docs   fwd ms  TFLOP/s  fwd+bwd ms  TFLOP/s")
    for r in rows:
        if "error" in r:
            print(f"{r['backend']:7} {r['error']}")
            continue
        print(
            f"{r['backend']:7} {r['batch']:3} {r['seq']:5} {r['window']!s:>7} {r['documents']:4} "
            f"{r['forward_ms']:8.3f} {r['forward_tflops']:8.0f} {r['both_ms']:11.3f} {r['both_tflops']:8.0f}"
        )
    if args.tune:
        rows += tune_meta_kernels()
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1))
    return int(any("error" in r for r in rows))
