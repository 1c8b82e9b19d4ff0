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

from hymba_train.bench.timing import milliseconds, need_gpu
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


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="hymba bench attention", description=__doc__)
    names = [backend.name for backend in BACKENDS["attention"] if "cuda" in backend.device_types]
    parser.add_argument("--backends", nargs="+", choices=names, default=[n for n in names if n != "torch"])
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.parse_args(argv)
    need_gpu("attention")
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
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1))
    return int(any("error" in r for r in rows))
