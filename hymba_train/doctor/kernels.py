"""Which backend of each op this machine has, which one a run would take, and whether each computes the right thing."""

from __future__ import annotations

from typing import Any

from hymba_train.doctor.report import BAD, WARN, Finding

TOLERANCE = {"float32": 2e-3, "bf16": 6e-2}  # relative to the largest value expected


def kernels() -> list[Finding]:
    """One line a backend, and one for what `auto` chooses."""
    import importlib.util

    import torch

    from hymba_train.ops import BACKENDS, select

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    findings = []
    if kind == "cuda" and importlib.util.find_spec("transformer_engine") is None:
        advice = (
            "precision.layer_spec=auto needs it on a GPU: install hymba-train[gpu], or use precision.layer_spec=local"
        )
        findings.append(Finding("transformer engine", "not installed", WARN, advice))
    for op, backends in BACKENDS.items():
        findings.append(Finding(op, select(op, "auto", kind, needs={"backward"}, dtype=dtype).description))
        expected = run(op, "torch", kind, torch.float32)
        for backend in backends:
            obstacles = backend.obstacles(kind, {"backward"}, dtype)
            if obstacles:
                findings.append(Finding(f"  {backend.name}", "not here: " + ", ".join(obstacles)))
                continue
            findings.append(_compare(op, backend.name, kind, dtype, expected))
    return findings


def _compare(op: str, name: str, kind: str, dtype: Any, expected: Any) -> Finding:
    from hymba_train.ops.registry import DTYPE_NAMES

    try:
        out = run(op, name, kind, dtype)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Finding(f"  {name}", "fails", BAD, f"{reason}; choose another backend (precision.*_backend)")
    error = float((out.double() - expected.double()).abs().max() / expected.double().abs().max())
    limit = TOLERANCE[DTYPE_NAMES[dtype]]
    if not error <= limit:
        advice = f"allowed is {limit:g}; choose another backend (precision.*_backend)"
        return Finding(
            f"  {name}", f"wrong: off by {error:.1e} of the largest value in {DTYPE_NAMES[dtype]}", BAD, advice
        )
    return Finding(f"  {name}", f"agrees with torch to {error:.0e} in {DTYPE_NAMES[dtype]}")


def _run_fused(op: str, function: Any, make: Any, kind: str) -> tuple[list[Any], Any]:
    """(inputs, first output) of an op other than attention and scan."""
    import torch

    rows, width = 40, 64
    x, weight = make(rows, width), make(width)
    if op == "causal_conv_rows":
        inputs = [x, make(width, 4), weight]
        return inputs, function(*inputs, num_meta=8, batch=2, seq=16)
    if op == "rotate_heads":
        from hymba_train.ops import rope_tables

        return [x], function(x, *rope_tables(torch.arange(rows, device=kind), 16, 1e4), 4)
    if op == "linear_cross_entropy":
        labels = torch.arange(rows, device=kind)
        return [x], function(x, make(48, width), labels, 41)
    calls = {
        "rms_norm": lambda: function(x, weight, 1e-6),
        "add_rms_norm": lambda: function(x, make(rows, width), weight, 1e-6)[1],
        "group_rms_norm": lambda: function(x, (make(32), make(16), make(16)), 1e-6),
        "normed_average": lambda: function(x, make(rows, width), weight, make(width), 1e-6, width),
        "swiglu": lambda: function(x),
    }
    return [x], calls[op]()


def run(op: str, name: str, kind: str, dtype: Any) -> Any:
    """Output and gradient of one backend on small fixed inputs, flat, float32 on the CPU."""
    import torch

    from hymba_train.ops import select

    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(kind, dtype).requires_grad_()

    function = select(op, name, kind, needs={"backward"}, dtype=dtype)
    b, s, m, c, n, heads, width = 2, 64, 16, 64, 16, 4, 32
    if op == "attention":
        inputs = [make(b, s, heads, width) for _ in range(3)] + [make(m, heads, width) for _ in range(3)]
        out = function(*inputs, window=24, scale=width**-0.5)[0]
    elif op == "selective_scan":
        inputs = [make(b, s, c), make(b, s, c)]
        a_log = torch.rand(c, n, generator=generator).to(kind).requires_grad_()
        inputs += [a_log, make(b, s, n), make(b, s, n)]
        inputs += [torch.rand(c, generator=generator).to(kind).requires_grad_() for _ in range(2)]
        out = function(*inputs, make(b, s, c))[0]
    elif op == "ssd_scan":
        per_head = [torch.rand(heads, generator=generator).to(kind).requires_grad_() for _ in range(3)]
        inputs = [make(b, s, heads, 16), make(b, s, heads), per_head[0], make(b, s, 1, n), make(b, s, 1, n)]
        inputs += per_head[1:]
        out = function(*inputs, initial_state=make(heads, 16, n))[0]
    else:
        inputs, out = _run_fused(op, function, make, kind)
    out.float().square().sum().backward()
    return torch.cat([out.detach().float().cpu().flatten(), inputs[0].grad.float().cpu().flatten()])
