"""Triton kernels of the selective scan; launched by :mod:`hymba_train.ops.selective_scan_triton`.

A program is one warp with BC = 32 channels: all N states of a channel sit in the registers of one lane, so the sum over
states needs no shuffle and the recurrence no synchronisation. The number of channels stays out of specialisation on
purpose: were it known to be a multiple of 16, loads would be vectorised and the states spread over lanes.

Steps past the end of the sequence, and channels past the last, take delta = 0: they leave a state as it is and have no
gradient. ``starts[b, t] != 0`` says that the state before t is the initial one again.
"""

import triton
import triton.language as tl

_SIZES = ["num_tokens", "C", "num_chunks"]


@triton.jit
def _softplus(x):
    # log(1 + e) by Kahan's log1p: time steps of 1e-3 are where 1 + e loses half of the digits of e.
    e = tl.exp(tl.minimum(x, 20.0))
    w = 1.0 + e
    small = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.where(x > 20.0, x, small)


@triton.jit
def _load(pointer, row, C, c, ok):
    return tl.load(pointer + row * C + c, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _delta(DT, row, C, c, ok, bias):
    return tl.where(ok, _softplus(_load(DT, row, C, c, ok) + bias), 0.0)


@triton.jit
def _state_row(pointer, row, valid, N: tl.constexpr):
    n = tl.arange(0, N)
    return tl.load(pointer + row * N + n, mask=(n < N) & valid, other=0.0)


@triton.jit
def _is_start(starts, row, valid):
    return tl.load(starts + row, mask=valid, other=0) != 0


@triton.jit
def _restart(h, initial, START, row, valid, inside, STARTS: tl.constexpr):
    """h, or what ``initial`` points to if a document starts at row."""
    if STARTS:  # a constant, unlike the test inside  # noqa: SIM102
        if _is_start(START, row, valid):
            h = tl.load(initial, mask=inside[None, :], other=0.0)
    return h


@triton.jit
def _advance(h, X, DT, Bm, row, valid, C, c, inside, a2, bias, N: tl.constexpr):
    """One step of the recurrence: (new h, x, delta)."""
    ok = inside & valid
    x = _load(X, row, C, c, ok)
    delta = _delta(DT, row, C, c, ok, bias)
    bn = _state_row(Bm, row, valid, N)
    return tl.exp2(delta[None, :] * a2) * h + bn[:, None] * (delta * x)[None, :], x, delta


@triton.jit(do_not_specialize=_SIZES)
def scan_state(
    X, DT, Bm, A2, BIAS, INIT, START, H, SD, num_tokens, C, num_chunks,
    CHUNK: tl.constexpr, N: tl.constexpr, BC: tl.constexpr, U: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    """State at each chunk's end from a zero start (H), and the sum of delta (SD): its decay is exp2(a2 * sum)."""
    chunk, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    c, n = tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, N)
    inside = c < C
    at = n[:, None] * C + c[None, :]
    a2 = tl.load(A2 + at, mask=inside[None, :], other=0.0)
    bias = tl.load(BIAS + c, mask=inside, other=0.0)
    h = tl.zeros([N, BC], tl.float32)
    total = tl.zeros([BC], tl.float32)
    last = tl.minimum(chunk * CHUNK + CHUNK, num_tokens)
    for t in range(chunk * CHUNK, last, U):
        for i in tl.static_range(U):
            valid = t + i < last
            row = b * num_tokens + t + i
            h = _restart(h, INIT + b * N * C + at, START, row, valid, inside, STARTS)
            h, _, delta = _advance(h, X, DT, Bm, row, valid, C, c, inside, a2, bias, N)
            total += delta
    base = b * num_chunks + chunk
    tl.store(H + base * N * C + at, h, mask=inside[None, :])
    tl.store(SD + base * C + c, total, mask=inside)


@triton.jit(do_not_specialize=["C", "num_chunks"])
def scan_pass(H, SD, KEEP, A2, FIRST, LAST, C, num_chunks, REVERSE: tl.constexpr, N: tl.constexpr, BC: tl.constexpr):
    """Turn what each chunk adds into what comes in to each chunk, in place, from FIRST on; LAST gets what goes out.

    A chunk with a document start in it (KEEP = 0) lets nothing through. REVERSE: gradients, last chunk first.
    """
    b = tl.program_id(1).to(tl.int64)
    c, n = tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, N)
    inside = c < C
    at = n[:, None] * C + c[None, :]
    a2 = tl.load(A2 + at, mask=inside[None, :], other=0.0)
    h = tl.load(FIRST + b * N * C + at, mask=inside[None, :], other=0.0)
    for k in range(num_chunks):
        chunk = num_chunks - 1 - k if REVERSE else k
        base = b * num_chunks + chunk
        place = H + base * N * C + at
        added = tl.load(place, mask=inside[None, :], other=0.0)
        tl.store(place, h, mask=inside[None, :])
        total = tl.load(SD + base * C + c, mask=inside, other=0.0)
        keep = tl.load(KEEP + base) != 0
        h = tl.where(keep, tl.exp2(total[None, :] * a2) * h, 0.0) + added
    tl.store(LAST + b * N * C + at, h, mask=inside[None, :])


@triton.jit(do_not_specialize=_SIZES)
def scan_output(
    X, DT, Z, Bm, Cm, A2, BIAS, DSKIP, INIT, START, H, Y, num_tokens, C, num_chunks,
    CHUNK: tl.constexpr, N: tl.constexpr, BC: tl.constexpr, U: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    """y = (C.h + D x) silu(z) of a chunk, from its start state in H."""
    chunk, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    c, n = tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, N)
    inside = c < C
    at = n[:, None] * C + c[None, :]
    a2 = tl.load(A2 + at, mask=inside[None, :], other=0.0)
    bias = tl.load(BIAS + c, mask=inside, other=0.0)
    skip = tl.load(DSKIP + c, mask=inside, other=0.0)
    h = tl.load(H + (b * num_chunks + chunk) * N * C + at, mask=inside[None, :], other=0.0)
    last = tl.minimum(chunk * CHUNK + CHUNK, num_tokens)
    for t in range(chunk * CHUNK, last, U):
        for i in tl.static_range(U):
            valid = t + i < last
            row = b * num_tokens + t + i
            h = _restart(h, INIT + b * N * C + at, START, row, valid, inside, STARTS)
            h, x, _ = _advance(h, X, DT, Bm, row, valid, C, c, inside, a2, bias, N)
            z = _load(Z, row, C, c, inside & valid)
            cn = _state_row(Cm, row, valid, N)
            y = (tl.sum(h * cn[:, None], 0) + skip * x) * z * tl.sigmoid(z)
            tl.store(Y + row * C + c, y.to(Y.dtype.element_ty), mask=inside & valid)


@triton.jit(do_not_specialize=_SIZES)
def scan_carry(
    DT, Z, DO, Cm, A2, BIAS, START, G, num_tokens, C, num_chunks,
    CHUNK: tl.constexpr, N: tl.constexpr, BC: tl.constexpr, U: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    """Gradient that each chunk's outputs send to the state before the chunk."""
    chunk, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    c, n = tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, N)
    inside = c < C
    at = n[:, None] * C + c[None, :]
    a2 = tl.load(A2 + at, mask=inside[None, :], other=0.0)
    bias = tl.load(BIAS + c, mask=inside, other=0.0)
    g = tl.zeros([N, BC], tl.float32)
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, num_tokens)
    for k in range(0, tl.cdiv(last - first, U)):
        for i in tl.static_range(U):
            t = first + (tl.cdiv(last - first, U) - k) * U - 1 - i
            valid = t < last
            ok = inside & valid
            row = b * num_tokens + t
            z = _load(Z, row, C, c, ok)
            dy = _load(DO, row, C, c, ok) * z * tl.sigmoid(z)
            delta = _delta(DT, row, C, c, ok, bias)
            cn = _state_row(Cm, row, valid, N)
            g = tl.exp2(delta[None, :] * a2) * (g + cn[:, None] * dy[None, :])
            if STARTS:  # noqa: SIM102
                if _is_start(START, row, valid):
                    g = tl.zeros([N, BC], tl.float32)
    tl.store(G + (b * num_chunks + chunk) * N * C + at, g, mask=inside[None, :])


@triton.jit(do_not_specialize=_SIZES)
def scan_backward(
    X, DT, Z, DO, Bm, Cm, A2, BIAS, DSKIP, INIT, START, H, G, HS, DX, DDT, DZ, DB, DC, DA, DRESET, DD, DBIAS,
    num_tokens, C, num_chunks,
    CHUNK: tl.constexpr, N: tl.constexpr, BC: tl.constexpr, U: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    """All gradients of a chunk, from its start state in H and the gradient to its end state in G.

    HS is scratch: the state before every U-th step. DB, DC are partial sums of a program's channels, DA, DRESET, DD,
    DBIAS of its steps; DRESET is the gradient that document starts send to the initial state.
    """
    block, chunk, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    c, n = block * BC + tl.arange(0, BC), tl.arange(0, N)
    inside = c < C
    at = n[:, None] * C + c[None, :]
    a2 = tl.load(A2 + at, mask=inside[None, :], other=0.0)
    bias = tl.load(BIAS + c, mask=inside, other=0.0)
    skip = tl.load(DSKIP + c, mask=inside, other=0.0)
    base = b * num_chunks + chunk
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, num_tokens)
    pieces = tl.cdiv(last - first, U)
    scratch = HS + base * (CHUNK // U) * N * C + at
    initial = INIT + b * N * C + at
    partial = (block.to(tl.int64) * tl.num_programs(2) + b) * num_tokens

    h = tl.load(H + base * N * C + at, mask=inside[None, :], other=0.0)
    for k in range(0, pieces):
        tl.store(scratch + k * N * C, h, mask=inside[None, :])
        for i in tl.static_range(U):
            t = first + k * U + i
            row = b * num_tokens + t
            h = _restart(h, initial, START, row, t < last, inside, STARTS)
            h, x, delta = _advance(h, X, DT, Bm, row, t < last, C, c, inside, a2, bias, N)
    tl.debug_barrier()  # the states just stored are loaded below

    g = tl.load(G + base * N * C + at, mask=inside[None, :], other=0.0)
    dA = tl.zeros([N, BC], tl.float32)
    d_reset = tl.zeros([N, BC], tl.float32)
    d_skip = tl.zeros([BC], tl.float32)
    d_bias = tl.zeros([BC], tl.float32)
    for back in range(0, pieces):
        k = pieces - 1 - back
        h = tl.load(scratch + k * N * C, mask=inside[None, :], other=0.0)
        before = ()
        after = ()
        for i in tl.static_range(U):
            t = first + k * U + i
            row = b * num_tokens + t
            h = _restart(h, initial, START, row, t < last, inside, STARTS)
            before = before + (h,)  # noqa: RUF005 (Triton)
            h, x, delta = _advance(h, X, DT, Bm, row, t < last, C, c, inside, a2, bias, N)
            after = after + (h,)  # noqa: RUF005
        for i in tl.static_range(U - 1, -1, -1):
            t = first + k * U + i
            valid = t < last
            ok = inside & valid
            row = b * num_tokens + t
            x = _load(X, row, C, c, ok)
            z = _load(Z, row, C, c, ok)
            do = _load(DO, row, C, c, ok)
            raw = _load(DT, row, C, c, ok) + bias
            delta = tl.where(ok, _softplus(raw), 0.0)
            bn = _state_row(Bm, row, valid, N)
            cn = _state_row(Cm, row, valid, N)
            gate = tl.sigmoid(z)
            dy = do * z * gate
            y = tl.sum(after[i] * cn[:, None], 0) + skip * x
            tl.store(DZ + row * C + c, (do * y * gate * (1.0 + z * (1.0 - gate))).to(DZ.dtype.element_ty), mask=ok)
            g = g + cn[:, None] * dy[None, :]
            tl.store(DB + (partial + t) * N + n, tl.sum(g * (delta * x)[None, :], 1), mask=(n < N) & valid)
            tl.store(DC + (partial + t) * N + n, tl.sum(after[i] * dy[None, :], 1), mask=(n < N) & valid)
            to_input = tl.sum(g * bn[:, None], 0)
            g = g * tl.exp2(delta[None, :] * a2)
            q = g * before[i]
            dA += delta[None, :] * q
            d_delta = x * to_input + 0.6931471805599453 * tl.sum(q * a2, 0)
            d_raw = tl.where(ok, d_delta * tl.sigmoid(raw), 0.0)
            tl.store(DX + row * C + c, (skip * dy + delta * to_input).to(DX.dtype.element_ty), mask=ok)
            tl.store(DDT + row * C + c, d_raw.to(DDT.dtype.element_ty), mask=ok)
            d_skip += dy * x
            d_bias += d_raw
            if STARTS:  # noqa: SIM102
                if _is_start(START, row, valid):
                    d_reset += g
                    g = tl.zeros([N, BC], tl.float32)
    tl.store(DA + base * N * C + at, dA, mask=inside[None, :])
    if STARTS:
        tl.store(DRESET + base * N * C + at, d_reset, mask=inside[None, :])
    tl.store(DD + base * C + c, d_skip, mask=inside)
    tl.store(DBIAS + base * C + c, d_bias, mask=inside)
