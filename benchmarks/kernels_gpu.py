"""Microseconds of single kernels of the fused ops on one GPU, named as in a profile, and other block sizes for them.

python -m benchmarks.kernels_gpu [--tokens 16384] [--tune] [--seconds 60]

First every kernel at its present settings, forward and backward of each op of benchmarks/fused_gpu.py that is below,
and the kernels of attention's meta prefix: the numbers to hold against a profile of the step. Then, with ``--tune``,
times of other settings, for ``--seconds``: of the meta prefix's kernels alone, of the others forward + backward and
forward.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.fused_cases import DEVICE, HEADS, KV_HEADS, META, Case, cases, randn
from benchmarks.fused_gpu import results, tune
from benchmarks.gpu_timing import milliseconds
from hymba_train.bench.timing import profiled_kernels, settings
from hymba_train.ops import attention_cudnn

OPS = ("normed_average", "conv_rows", "add_rms_norm", "rms_norm", "group_rms_norm", "rope of q")
SEQ = 2048
META_KNOBS = {
    "merge_meta": ("MERGE", [(4, 2, 2), (4, 1, 2), (4, 1, 4), (8, 2, 1), (8, 1, 1), (8, 2, 2)]),
    "meta_backward": ("BACKWARD", [(8, 3, 1), (8, 2, 1), (8, 1, 1), (16, 2, 1), (8, 3, 4)]),
}
"""Kernel -> prefix of its constants in ops/attention_cudnn.py; (warps, items under way, programs a multiprocessor)."""


def meta_kernels(tokens: int) -> dict[str, Callable[[], object]]:
    """The kernels of the meta prefix on sequences of SEQ tokens; meta_backward with the sum after it."""
    q, k, v = randn(tokens // SEQ, SEQ, HEADS, 64), randn(META, KV_HEADS, 64), randn(META, KV_HEADS, 128)
    out, d_out, merged = (randn(*q.shape[:3], 128) for _ in range(3))
    q, k, v, out, d_out, merged = (x.bfloat16() for x in (q, k, v, out, d_out, merged))
    d_q, lse = torch.zeros_like(q), torch.full((q.shape[0], HEADS, SEQ, 1), 8.0, device=DEVICE)
    launch, merged_lse = attention_cudnn.MetaLaunch.of(q, k, v, lse, 0.125), torch.empty_like(lse)
    return {
        "merge_meta": lambda: launch.merge(q, k, v, out, lse, merged, merged_lse),
        "meta_backward": lambda: launch.backward(q, k, v, out, d_out, lse, d_q),
    }


def tune_meta(tokens: int, deadline: float) -> dict[str, list[tuple[float, dict]]]:
    """Kernel -> (ms, settings), the fastest first."""
    found = {}
    for kernel, function in meta_kernels(tokens).items():
        prefix, combinations = META_KNOBS[kernel]
        names = [f"{prefix}_{name}" for name in ("WARPS", "STAGES", "PROGRAMS")]
        tried = []
        for combination in combinations:
            if time.monotonic() > deadline:
                print(f"  out of time: tuning {kernel}", flush=True)
                break
            values = dict(zip(names, combination, strict=True))
            try:
                with settings(attention_cudnn, values):
                    tried.append((milliseconds(function)[0], values))
            except Exception as error:
                print(f"  FAILED {kernel} {values}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        found[kernel] = sorted(tried, key=lambda x: x[0])
    return found


def kernel_times(chosen: Sequence[Case], tokens: int) -> dict[str, float]:
    """Kernel -> microseconds a call, as a profiler sees them."""
    runs = list(meta_kernels(tokens).values())
    for case in chosen:
        inputs = case.inputs(tokens + META, torch.bfloat16)
        runs.append(lambda case=case, inputs=inputs: results(case, case.fused["triton"], inputs))

    def all_of(times: int) -> None:
        for _ in range(times):
            for run in runs:
                run()
        torch.cuda.synchronize()

    all_of(2)
    averages = profiled_kernels(lambda: all_of(5))
    kernels = [e for e in averages if "::" not in e.key and not e.key.startswith(("Mem", "cuda"))]
    return {e.key: e.device_time_total / e.count for e in sorted(kernels, key=lambda e: -e.device_time_total)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384, help=f"a multiple of {SEQ}")
    parser.add_argument("--tune", action="store_true", help="try other block sizes")
    parser.add_argument("--seconds", type=float, default=60, help="of trying; what does not fit is left out, and said")
    given = parser.parse_args(arguments)
    chosen = [case for case in cases() if case.name in OPS]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {given.tokens} tokens and {META} meta tokens")
    for name, microseconds in kernel_times(chosen, given.tokens).items():
        print(f"{microseconds:9.1f} us  {name[:90]}", flush=True)
    if not given.tune:
        return
    deadline = time.monotonic() + given.seconds
    for kernel, tried in tune_meta(given.tokens, deadline).items():
        print(f"{kernel}: ms", *(f"   {ms:.3f} {values}" for ms, values in tried), sep="\n", flush=True)
    for case in chosen:
        if case.knobs and case.name in OPS[:3]:
            print(f"{case.name}: ms both, forward", flush=True)
            for both, forward, values in tune(case, given.tokens + META, deadline):
                print(f"   {both:.3f} {forward:.3f} {values}", flush=True)


if __name__ == "__main__":
    main()
