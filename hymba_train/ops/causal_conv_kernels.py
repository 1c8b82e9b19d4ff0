"""Triton kernels of the causal convolution on flat rows; launched by :mod:`hymba_train.ops.causal_conv_triton`.

A program, of one warp, walks over CHUNK rows of BC channels, four rows a round. What neighbouring rows share stays in
registers, every value is loaded once, and a round's values are asked for one round ahead: the time of a round is that
of its arithmetic, not of memory. Documents cost nothing where none starts: REACH says for each row how many of the
inputs before it are of its own document, and only rounds with a row that reaches less than three look at it.
"""

import triton
import triton.language as tl


@triton.jit
def _row(X, t, stride, c, ok):
    """x[t] in its own dtype, zero unless ok."""
    return tl.load(X + t * stride + c, mask=ok, other=0.0)


@triton.jit
def _reach(REACH, t, ok):
    """Past the end: three, which is no reason to look closer."""
    return tl.load(REACH + t, mask=ok, other=3)


@triton.jit
def _weights(W, BIAS, c, inside):
    w0 = tl.load(W + 4 * c, mask=inside, other=0.0).to(tl.float32)
    w1 = tl.load(W + 4 * c + 1, mask=inside, other=0.0).to(tl.float32)
    w2 = tl.load(W + 4 * c + 2, mask=inside, other=0.0).to(tl.float32)
    w3 = tl.load(W + 4 * c + 3, mask=inside, other=0.0).to(tl.float32)
    return w0, w1, w2, w3, tl.load(BIAS + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _taps(X, num_meta, stride, c, inside):
    """What a document sees before its first row: the last, second and third last meta row."""
    m1 = _row(X, num_meta - 1, stride, c, inside & (num_meta >= 1)).to(tl.float32)
    m2 = _row(X, num_meta - 2, stride, c, inside & (num_meta >= 2)).to(tl.float32)
    m3 = _row(X, num_meta - 3, stride, c, inside & (num_meta >= 3)).to(tl.float32)
    return m1, m2, m3


@triton.jit
def _seen(h1, h2, h3, reach, m1, m2, m3):
    """What a row sees one, two and three back, where h1, h2, h3 are the rows before it, its document's or not."""
    e1 = tl.where(reach >= 1, h1, m1)
    e2 = tl.where(reach >= 2, h2, tl.where(reach == 1, m1, m2))
    e3 = tl.where(reach >= 3, h3, tl.where(reach == 2, m1, tl.where(reach == 1, m2, m3)))
    return e1, e2, e3


@triton.jit
def _forward_step(
    x, h1, h2, h3, reach, t, Y, stride, num_rows, c, inside, w0, w1, w2, w3, bias, m1, m2, m3, NEAR: tl.constexpr
):
    if NEAR:
        h1, h2, h3 = _seen(h1, h2, h3, reach, m1, m2, m3)
    y = bias + w3 * x + w2 * h1 + w1 * h2 + w0 * h3
    y = y / (1.0 + tl.exp(-y))
    if NEAR:
        y = tl.where(reach >= 0, y, 0.0)  # padding
    tl.store(Y + t * stride + c, y.to(Y.dtype.element_ty), mask=inside & (t < num_rows))


@triton.jit
def _forward_round(
    x0, x1, x2, x3, h1, h2, h3, r0, r1, r2, r3, t, X, Y, stride_x, stride_y, num_rows, num_meta, c, inside,
    w0, w1, w2, w3, bias, NEAR: tl.constexpr,
):  # fmt: skip
    """Rows t..t + 3, which are x0..x3; h1, h2, h3 lie one, two, three before t."""
    m1, m2, m3 = h1, h2, h3
    if NEAR:
        m1, m2, m3 = _taps(X, num_meta, stride_x, c, inside)
    _forward_step(
        x0, h1, h2, h3, r0, t, Y, stride_y, num_rows, c, inside, w0, w1, w2, w3, bias, m1, m2, m3, NEAR
    )  # fmt: skip
    _forward_step(
        x1, x0, h1, h2, r1, t + 1, Y, stride_y, num_rows, c, inside, w0, w1, w2, w3, bias, m1, m2, m3, NEAR
    )  # fmt: skip
    _forward_step(
        x2, x1, x0, h1, r2, t + 2, Y, stride_y, num_rows, c, inside, w0, w1, w2, w3, bias, m1, m2, m3, NEAR
    )  # fmt: skip
    _forward_step(
        x3, x2, x1, x0, r3, t + 3, Y, stride_y, num_rows, c, inside, w0, w1, w2, w3, bias, m1, m2, m3, NEAR
    )  # fmt: skip


@triton.jit
def conv_forward(
    X, W, BIAS, REACH, Y, num_rows, num_meta, C, stride_x, stride_y, CHUNK: tl.constexpr, BC: tl.constexpr
):
    """Y = silu(conv(X) + bias), every document from the last meta rows on; zero in rows of reach -1. CHUNK % 4 == 0."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < C
    first = tl.program_id(1).to(tl.int64) * CHUNK
    end = tl.minimum(first + CHUNK, num_rows)
    x0, x1 = _row(X, first, stride_x, c, inside), _row(X, first + 1, stride_x, c, inside & (first + 1 < end))
    x2 = _row(X, first + 2, stride_x, c, inside & (first + 2 < end))
    x3 = _row(X, first + 3, stride_x, c, inside & (first + 3 < end))
    r0, r1 = _reach(REACH, first, True), _reach(REACH, first + 1, first + 1 < end)
    r2, r3 = _reach(REACH, first + 2, first + 2 < end), _reach(REACH, first + 3, first + 3 < end)
    h1 = _row(X, first - 1, stride_x, c, inside & (first >= 1)).to(tl.float32)
    h2 = _row(X, first - 2, stride_x, c, inside & (first >= 2)).to(tl.float32)
    h3 = _row(X, first - 3, stride_x, c, inside & (first >= 3)).to(tl.float32)
    w0, w1, w2, w3, bias = _weights(W, BIAS, c, inside)
    for t in range(first, end, 4):
        n0 = _row(X, t + 4, stride_x, c, inside & (t + 4 < end))
        n1 = _row(X, t + 5, stride_x, c, inside & (t + 5 < end))
        n2 = _row(X, t + 6, stride_x, c, inside & (t + 6 < end))
        n3 = _row(X, t + 7, stride_x, c, inside & (t + 7 < end))
        s0, s1 = _reach(REACH, t + 4, t + 4 < end), _reach(REACH, t + 5, t + 5 < end)
        s2, s3 = _reach(REACH, t + 6, t + 6 < end), _reach(REACH, t + 7, t + 7 < end)
        f0, f1, f2, f3 = x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)
        if (r0 < 3) | (r1 < 3) | (r2 < 3) | (r3 < 3):
            _forward_round(
                f0, f1, f2, f3, h1, h2, h3, r0, r1, r2, r3, t, X, Y, stride_x, stride_y, num_rows, num_meta, c, inside,
                w0, w1, w2, w3, bias, True,
            )  # fmt: skip
        else:
            _forward_round(
                f0, f1, f2, f3, h1, h2, h3, r0, r1, r2, r3, t, X, Y, stride_x, stride_y, num_rows, num_meta, c, inside,
                w0, w1, w2, w3, bias, False,
            )  # fmt: skip
        h1, h2, h3 = f3, f2, f1
        x0, x1, x2, x3 = n0, n1, n2, n3
        r0, r1, r2, r3 = s0, s1, s2, s3


@triton.jit
def _d_pre(dy, x, e1, e2, e3, w0, w1, w2, w3, bias):
    """Gradient of the pre-activation, which is computed again."""
    p = bias + w3 * x + w2 * e1 + w1 * e2 + w0 * e3
    s = 1.0 / (1.0 + tl.exp(-p))
    return dy * (s + p * s * (1.0 - s))


@triton.jit
def _backward_step(
    dy, x, h1, h2, h3, reach, t, a0, a1, a2, dw0, dw1, dw2, dw3, d_bias, d1, d2, d3, DX, stride, num_rows, c, inside,
    w0, w1, w2, w3, bias, m1, m2, m3, NEAR: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Row t. a0, a1, a2: what later rows add to the gradients of rows t, t - 1, t - 2. COUNT: the row is this chunk's.

    dw*, d_bias: gradients of the weights; d1, d2, d3: of the last, second and third last meta row, from documents.
    """
    dy = dy.to(tl.float32)
    if NEAR:
        dy = tl.where(reach >= 0, dy, 0.0)  # padding
        e1, e2, e3 = _seen(h1, h2, h3, reach, m1, m2, m3)
    else:
        e1, e2, e3 = h1, h2, h3
    g = _d_pre(dy, x, e1, e2, e3, w0, w1, w2, w3, bias)
    to1, to2, to3 = w2 * g, w1 * g, w0 * g
    if COUNT:
        tl.store(DX + t * stride + c, (w3 * g + a0).to(DX.dtype.element_ty), mask=inside & (t < num_rows))
        dw3 += g * x
        dw2 += g * e1
        dw1 += g * e2
        dw0 += g * e3
        d_bias += g
        if NEAR:
            d1 += tl.where(reach == 0, to1, tl.where(reach == 1, to2, tl.where(reach == 2, to3, 0.0)))
            d2 += tl.where(reach == 0, to2, tl.where(reach == 1, to3, 0.0))
            d3 += tl.where(reach == 0, to3, 0.0)
    if NEAR:
        to1, to2, to3 = (
            tl.where(reach >= 1, to1, 0.0), tl.where(reach >= 2, to2, 0.0), tl.where(reach >= 3, to3, 0.0)
        )  # fmt: skip
    return a1 + to1, a2 + to2, to3, dw0, dw1, dw2, dw3, d_bias, d1, d2, d3


@triton.jit
def _backward_round(
    x0, x1, x2, n0, n1, n2, n3, y0, y1, y2, y3, r0, r1, r2, r3, t, a0, a1, a2, dw0, dw1, dw2, dw3, d_bias, d1, d2, d3,
    X, DX, stride_x, stride_d, num_rows, num_meta, c, inside, w0, w1, w2, w3, bias, NEAR: tl.constexpr,
):  # fmt: skip
    """Rows t, t - 1, t - 2, t - 3, in this order. x0, x1, x2, n0..n3: x from row t down; y0..y3, r0..r3: dy, reach."""
    m1, m2, m3 = x0, x1, x2
    if NEAR:
        m1, m2, m3 = _taps(X, num_meta, stride_x, c, inside)
    a0, a1, a2, dw0, dw1, dw2, dw3, d_bias, d1, d2, d3 = _backward_step(
        y0, x0, x1, x2, n0, r0, t, a0, a1, a2, dw0, dw1, dw2, dw3, d_bias, d1, d2, d3, DX, stride_d, num_rows, c,
        inside, w0, w1, w2, w3, bias, m1, m2, m3, NEAR, True,
    )  # fmt: skip
    a0, a1, a2, dw0, dw1, dw2, dw3, d_bias, d1, d2, d3 = _backward_step(
        y1, x1, x2, n0, n1, r1, t - 1, a0, a1, a2, dw0, dw1, dw2, dw3, d_bias, d1, d2, d3, DX, stride_d, num_rows, c,
        inside, w0, w1, w2, w3, bias, m1, m2, m3, NEAR, True,
    )  # fmt: skip
    a0, a1, a2, dw0, dw1, dw2, dw3, d_bias, d1, d2, d3 = _backward_step(
        y2, x2, n0, n1, n2, r2, t - 2, a0, a1, a2, dw0, dw1, dw2, dw3, d_bias, d1, d2, d3, DX, stride_d, num_rows, c,
        inside, w0, w1, w2, w3, bias, m1, m2, m3, NEAR, True,
    )  # fmt: skip
    a0, a1, a2, dw0, dw1, dw2, dw3, d_bias, d1, d2, d3 = _backward_step(
        y3, n0, n1, n2, n3, r3, t - 3, a0, a1, a2, dw0, dw1, dw2, dw3, d_bias, d1, d2, d3, DX, stride_d, num_rows, c,
        inside, w0, w1, w2, w3, bias, m1, m2, m3, NEAR, True,
    )  # fmt: skip
    return a0, a1, a2, dw0, dw1, dw2, dw3, d_bias, d1, d2, d3


@triton.jit
def conv_backward(
    X, W, BIAS, REACH, DY, DX, PARTIAL, num_rows, num_meta, C, stride_x, stride_y, stride_d,
    CHUNK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """DX but for what documents add to the meta rows; that, and gradients of the weights, as sums over each chunk.

    PARTIAL, float32 [chunks, 8, C]: four weights, bias, last, second and third last meta row.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < C
    first = tl.program_id(1).to(tl.int64) * CHUNK
    last = first + CHUNK
    # The next chunk's first three rows, of which this one's last rows are inputs.
    x0 = _row(X, last + 2, stride_x, c, inside & (last + 2 < num_rows)).to(tl.float32)
    x1 = _row(X, last + 1, stride_x, c, inside & (last + 1 < num_rows)).to(tl.float32)
    x2 = _row(X, last, stride_x, c, inside & (last < num_rows)).to(tl.float32)
    k0 = _row(X, last - 1, stride_x, c, inside & (last - 1 < num_rows)).to(tl.float32)
    k1 = _row(X, last - 2, stride_x, c, inside & (last - 2 < num_rows)).to(tl.float32)
    k2 = _row(X, last - 3, stride_x, c, inside & (last - 3 < num_rows)).to(tl.float32)
    q0 = _row(DY, last + 2, stride_y, c, inside & (last + 2 < num_rows))
    q1 = _row(DY, last + 1, stride_y, c, inside & (last + 1 < num_rows))
    q2 = _row(DY, last, stride_y, c, inside & (last < num_rows))
    s0, s1 = _reach(REACH, last + 2, last + 2 < num_rows), _reach(REACH, last + 1, last + 1 < num_rows)
    s2 = _reach(REACH, last, last < num_rows)
    # And the first round of this one.
    n0 = _row(X, last - 4, stride_x, c, inside & (last - 4 < num_rows))
    n1 = _row(X, last - 5, stride_x, c, inside & (last >= 5) & (last - 5 < num_rows))
    n2 = _row(X, last - 6, stride_x, c, inside & (last >= 6) & (last - 6 < num_rows))
    n3 = _row(X, last - 7, stride_x, c, inside & (last >= 7) & (last - 7 < num_rows))
    y0 = _row(DY, last - 1, stride_y, c, inside & (last - 1 < num_rows))
    y1 = _row(DY, last - 2, stride_y, c, inside & (last - 2 < num_rows))
    y2 = _row(DY, last - 3, stride_y, c, inside & (last - 3 < num_rows))
    y3 = _row(DY, last - 4, stride_y, c, inside & (last - 4 < num_rows))
    r0, r1 = _reach(REACH, last - 1, last - 1 < num_rows), _reach(REACH, last - 2, last - 2 < num_rows)
    r2, r3 = _reach(REACH, last - 3, last - 3 < num_rows), _reach(REACH, last - 4, last - 4 < num_rows)
    w0, w1, w2, w3, bias = _weights(W, BIAS, c, inside)
    m1, m2, m3 = _taps(X, num_meta, stride_x, c, inside)
    zero = tl.zeros([BC], tl.float32)
    a0, a1, a2 = zero, zero, zero
    dw0, dw1, dw2, dw3, d_bias, d1, d2, d3 = zero, zero, zero, zero, zero, zero, zero, zero
    a0, a1, a2, dw0, dw1, dw2, dw3, d_bias, d1, d2, d3 = _backward_step(
        q0, x0, x1, x2, k0, s0, last + 2, a0, a1, a2, dw0, dw1, dw2, dw3, d_bias, d1, d2, d3, DX, stride_d, num_rows,
        c, inside, w0, w1, w2, w3, bias, m1, m2, m3, True, False,
    )  # fmt: skip
    a0, a1, a2, dw0, dw1, dw2, dw3, d_bias, d1, d2, d3 = _backward_step(
        q1, x1, x2, k0, k1, s1, last + 1, a0, a1, a2, dw0, dw1, dw2, dw3, d_bias, d1, d2, d3, DX, stride_d, num_rows,
        c, inside, w0, w1, w2, w3, bias, m1, m2, m3, True, False,
    )  # fmt: skip
    a0, a1, a2, dw0, dw1, dw2, dw3, d_bias, d1, d2, d3 = _backward_step(
        q2, x2, k0, k1, k2, s2, last, a0, a1, a2, dw0, dw1, dw2, dw3, d_bias, d1, d2, d3, DX, stride_d, num_rows, c,
        inside, w0, w1, w2, w3, bias, m1, m2, m3, True, False,
    )  # fmt: skip
    x0, x1, x2 = k0, k1, k2
    for turn in range(0, CHUNK // 4):
        t = last - 1 - 4 * turn
        more = t - 4 >= first  # another round follows; its rows are t - 4 .. t - 7, of which x is seen to t - 10
        u = t - 4
        e0 = _row(X, u - 3, stride_x, c, inside & more & (u - 3 < num_rows) & (u >= 3))
        e1 = _row(X, u - 4, stride_x, c, inside & more & (u - 4 < num_rows) & (u >= 4))
        e2 = _row(X, u - 5, stride_x, c, inside & more & (u - 5 < num_rows) & (u >= 5))
        e3 = _row(X, u - 6, stride_x, c, inside & more & (u - 6 < num_rows) & (u >= 6))
        z0 = _row(DY, u, stride_y, c, inside & more & (u < num_rows))
        z1 = _row(DY, u - 1, stride_y, c, inside & more & (u - 1 < num_rows))
        z2 = _row(DY, u - 2, stride_y, c, inside & more & (u - 2 < num_rows))
        z3 = _row(DY, u - 3, stride_y, c, inside & more & (u - 3 < num_rows))
        s0, s1 = _reach(REACH, u, more & (u < num_rows)), _reach(REACH, u - 1, more & (u - 1 < num_rows))
        s2, s3 = _reach(REACH, u - 2, more & (u - 2 < num_rows)), _reach(REACH, u - 3, more & (u - 3 < num_rows))
        f0, f1, f2, f3 = n0.to(tl.float32), n1.to(tl.float32), n2.to(tl.float32), n3.to(tl.float32)
        if (r0 < 3) | (r1 < 3) | (r2 < 3) | (r3 < 3):
            a0, a1, a2, dw0, dw1, dw2, dw3, d_bias, d1, d2, d3 = _backward_round(
                x0, x1, x2, f0, f1, f2, f3, y0, y1, y2, y3, r0, r1, r2, r3, t, a0, a1, a2, dw0, dw1, dw2, dw3, d_bias,
                d1, d2, d3, X, DX, stride_x, stride_d, num_rows, num_meta, c, inside, w0, w1, w2, w3, bias, True,
            )  # fmt: skip
        else:
            a0, a1, a2, dw0, dw1, dw2, dw3, d_bias, d1, d2, d3 = _backward_round(
                x0, x1, x2, f0, f1, f2, f3, y0, y1, y2, y3, r0, r1, r2, r3, t, a0, a1, a2, dw0, dw1, dw2, dw3, d_bias,
                d1, d2, d3, X, DX, stride_x, stride_d, num_rows, num_meta, c, inside, w0, w1, w2, w3, bias, False,
            )  # fmt: skip
        x0, x1, x2 = f1, f2, f3
        n0, n1, n2, n3 = e0, e1, e2, e3
        y0, y1, y2, y3 = z0, z1, z2, z3
        r0, r1, r2, r3 = s0, s1, s2, s3
    line = PARTIAL + tl.program_id(1).to(tl.int64) * 8 * C + c
    tl.store(line, dw0, mask=inside)
    tl.store(line + C, dw1, mask=inside)
    tl.store(line + 2 * C, dw2, mask=inside)
    tl.store(line + 3 * C, dw3, mask=inside)
    tl.store(line + 4 * C, d_bias, mask=inside)
    tl.store(line + 5 * C, d1, mask=inside)
    tl.store(line + 6 * C, d2, mask=inside)
    tl.store(line + 7 * C, d3, mask=inside)


@triton.jit
def conv_finish(PARTIAL, DW, DBIAS, DX, lines, num_meta, C, stride_d, LINES: tl.constexpr, BC: tl.constexpr):
    """Adds up the chunks' lines of one part: into DW [C, 4], DBIAS [C], and onto DX of the last three meta rows."""
    c, part = tl.program_id(0) * BC + tl.arange(0, BC), tl.program_id(1)
    inside = c < C
    total = tl.zeros([BC], tl.float32)
    for first in range(0, lines, LINES):
        line = first + tl.arange(0, LINES)[:, None]
        at = PARTIAL + (line.to(tl.int64) * 8 + part) * C + c[None, :]
        total += tl.sum(tl.load(at, mask=(line < lines) & inside[None, :], other=0.0), 0)
    if part < 4:
        tl.store(DW + 4 * c + part, total.to(DW.dtype.element_ty), mask=inside)
    elif part == 4:
        tl.store(DBIAS + c, total.to(DBIAS.dtype.element_ty), mask=inside)
    else:
        row = num_meta - (part - 4)
        ok = inside & (row >= 0)
        place = DX + row * stride_d + c
        d = tl.load(place, mask=ok, other=0.0).to(tl.float32) + total
        tl.store(place, d.to(DX.dtype.element_ty), mask=ok)
