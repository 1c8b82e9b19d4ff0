"""The table of docs/testing.md: lines and branches that a measured run of the tests covers, by package.

``python -m tests.coverage_table coverage.json``, of ``coverage json`` (``make coverage`` does both). What only a GPU
runs is counted apart, file by file: :data:`GPU_ONLY`. Covered: of lines and branches together, as coverage.py has it.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from fnmatch import fnmatch
from pathlib import PurePosixPath

GPU_ONLY = (
    "hymba_train/ops/*_triton.py", "hymba_train/ops/*_kernels.py", "hymba_train/ops/*_cuda.py",
    "hymba_train/ops/*_cudnn.py", "hymba_train/ops/*_mamba_ssm.py", "hymba_train/ops/nvrtc.py",
    "hymba_train/bench/attention.py", "hymba_train/bench/dense.py", "hymba_train/bench/gemm.py",
    "hymba_train/bench/plain.py", "hymba_train/bench/timing.py",
)  # fmt: skip
COUNTS = ("num_statements", "covered_lines", "num_branches", "covered_branches")


def package_of(path: str) -> str:
    """``hymba_train/ops`` for all that is below it; ``hymba_train`` for what lies in it; the file itself on a GPU."""
    if any(fnmatch(path, pattern) for pattern in GPU_ONLY):
        return path
    return "/".join(PurePosixPath(path).parts[:-1][:2])


def table(report: dict) -> list[str]:
    """Lines of Markdown. ``report``: what ``coverage json`` writes."""
    found: dict[str, list[int]] = defaultdict(lambda: [0] * len(COUNTS))
    for path, entry in report["files"].items():
        for name in (package_of(path), "all" if package_of(path) != path else "all for GPUs"):
            found[name] = [a + entry["summary"][count] for a, count in zip(found[name], COUNTS, strict=True)]
    heads = ("all", "all for GPUs")
    packages = sorted(name for name in found if not name.endswith(".py") and name not in heads)
    files = sorted(name for name in found if name.endswith(".py"))
    lines = ["| Part | Lines | Missed | Branches | Missed | Covered |", "|---|---|---|---|---|---|"]
    for name in [*packages, "all", *files, "all for GPUs"]:
        if name not in found:
            continue
        statements, lines_covered, branches, branches_covered = found[name]
        share = (lines_covered + branches_covered) / max(statements + branches, 1)
        label = name if name in heads else f"`{name}`"
        lines.append(
            f"| {label} | {statements} | {statements - lines_covered} | {branches} | {branches - branches_covered}"
            f" | {100 * share:.0f}% |"
        )
    return lines


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        print("\n".join(table(json.load(file))))
