"""Triton kernels of the causal convolution; launched by :mod:`hymba_train.ops.causal_conv_triton`.

A program walks over CHUNK tokens of BC channels, four tokens a round, with the inputs (backward: and the gradients of
the pre-activation) of three neighbouring tokens in registers: every value is loaded once. A document starts at t where
SEG[t] != SEG[t - 1]; tokens then see the initial taps in place of what lies before t. Chunks without a start, all but
few, take a path that knows nothing of documents and taps.
"""

import triton
import triton.language as tl


@triton.jit
def _load(pointer, c, ok):
    return tl.load(pointer + c, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _start(SEG, t, num_tokens, SEGMENTS: tl.constexpr):
    """A document starts at t. Not at token 0: what lies before that are the taps anyway."""
    if SEGMENTS:
        inside = (t > 0) & (t < num_tokens)
        return tl.load(SEG + t, mask=inside, other=0) != tl.load(SEG + t - 1, mask=inside, other=0)
    else:
        return t < -1000000000  # False


@triton.jit
def _has_start(SEG, first, last, num_tokens, SPAN: tl.constexpr, SEGMENTS: tl.constexpr):
    """A document, or the row, starts in first..last (at most SPAN tokens)."""
    found = first <= 0
    if SEGMENTS:
        t = first + tl.arange(0, SPAN)
        inside = (t > 0) & (t < num_tokens) & (t <= last)
        here = tl.load(SEG + t, mask=inside, other=0)
        before = tl.load(SEG + t - 1, mask=inside, other=0)
        found = found | (tl.max((here != before).to(tl.int32), 0) > 0)
    return found


@triton.jit
def _input(X, TAPS, t, stride, C, c, inside, num_tokens, RESETS: tl.constexpr):
    """x[t]; before token 0 the taps."""
    x = _load(X + t * stride, c, inside & (t >= 0) & (t < num_tokens))
    if RESETS:  # a constant  # noqa: SIM102
        if t < 0:
            x = _load(TAPS + (t + 3) * C, c, inside & (t >= -3))
    return x


@triton.jit
def _weights(W, BIAS, c, inside):
    w0, w1, w2, w3 = (
        _load(W, 4 * c, inside), _load(W + 1, 4 * c, inside), _load(W + 2, 4 * c, inside), _load(W + 3, 4 * c, inside)
    )  # fmt: skip
    return w0, w1, w2, w3, _load(BIAS, c, inside)


@triton.jit
def _forward_step(
    x, h1, h2, h3, t, end, SEG, TAPS, Y, stride, C, c, inside, w0, w1, w2, w3, bias, num_tokens,
    RESETS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """One token; h1, h2, h3 lie one, two, three tokens before it. Returns them for the next one."""
    if RESETS and SEGMENTS:  # noqa: SIM102
        if _start(SEG, t, num_tokens, SEGMENTS):
            h1, h2, h3 = _load(TAPS + 2 * C, c, inside), _load(TAPS + C, c, inside), _load(TAPS, c, inside)
    y = bias + w3 * x + w2 * h1 + w1 * h2 + w0 * h3
    y = y / (1.0 + tl.exp(-y))
    tl.store(Y + t * stride + c, y.to(Y.dtype.element_ty), mask=inside & (t < end))
    return x, h1, h2


@triton.jit
def _forward_chunk(
    X, W, BIAS, TAPS, SEG, Y, stride_x, stride_y, first, num_tokens, C, c, inside,
    CHUNK: tl.constexpr, RESETS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    w0, w1, w2, w3, bias = _weights(W, BIAS, c, inside)
    h1 = _input(X, TAPS, first - 1, stride_x, C, c, inside, num_tokens, RESETS)
    h2 = _input(X, TAPS, first - 2, stride_x, C, c, inside, num_tokens, RESETS)
    h3 = _input(X, TAPS, first - 3, stride_x, C, c, inside, num_tokens, RESETS)
    if RESETS and SEGMENTS:
        if _start(SEG, first - 2, num_tokens, SEGMENTS):
            h3 = _load(TAPS + 2 * C, c, inside)
        if _start(SEG, first - 1, num_tokens, SEGMENTS):
            h2, h3 = _load(TAPS + 2 * C, c, inside), _load(TAPS + C, c, inside)
    end = tl.minimum(first + CHUNK, num_tokens)
    LOADS: tl.constexpr = 1 if RESETS else 4
    for t in range(first, end, LOADS):
        x0 = _load(X + t * stride_x, c, inside)
        if LOADS == 4:
            x1 = _load(X + (t + 1) * stride_x, c, inside & (t + 1 < end))
            x2 = _load(X + (t + 2) * stride_x, c, inside & (t + 2 < end))
            x3 = _load(X + (t + 3) * stride_x, c, inside & (t + 3 < end))
        for i in tl.static_range(LOADS):
            if i == 0:
                x = x0
            elif i == 1:
                x = x1
            elif i == 2:
                x = x2
            else:
                x = x3
            h1, h2, h3 = _forward_step(
                x, h1, h2, h3, t + i, end, SEG, TAPS, Y, stride_y, C, c, inside, w0, w1, w2, w3, bias, num_tokens,
                RESETS, SEGMENTS,
            )  # fmt: skip


@triton.jit
def conv_forward(
    X, W, BIAS, TAPS, SEG, Y, num_tokens, C, batch_x, stride_x, batch_t, batch_y, stride_y,
    CHUNK: tl.constexpr, BC: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Y = silu(conv(X) + bias). batch_*, stride_*: from row to row and from token to token."""
    b = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < C
    first = tl.program_id(1).to(tl.int64) * CHUNK
    X, Y, TAPS, SEG = X + b * batch_x, Y + b * batch_y, TAPS + b * batch_t, SEG + b * num_tokens
    resets = _has_start(SEG, first - 2, first + CHUNK - 1, num_tokens, 2 * CHUNK, SEGMENTS)
    if resets:
        _forward_chunk(
            X, W, BIAS, TAPS, SEG, Y, stride_x, stride_y, first, num_tokens, C, c, inside, CHUNK, True, SEGMENTS
        )
    else:
        _forward_chunk(
            X, W, BIAS, TAPS, SEG, Y, stride_x, stride_y, first, num_tokens, C, c, inside, CHUNK, False, SEGMENTS
        )


@triton.jit
def _seen(r1, r2, r3, t, SEG, TAPS, C, c, inside, num_tokens, RESETS: tl.constexpr, SEGMENTS: tl.constexpr):
    """What token t sees one, two, three tokens back: r1, r2, r3 as far as they are of its document, else taps."""
    if RESETS and SEGMENTS:
        if _start(SEG, t - 2, num_tokens, SEGMENTS):
            r3 = _load(TAPS + 2 * C, c, inside)
        if _start(SEG, t - 1, num_tokens, SEGMENTS):
            r2, r3 = _load(TAPS + 2 * C, c, inside), _load(TAPS + C, c, inside)
        if _start(SEG, t, num_tokens, SEGMENTS):
            r1, r2, r3 = _load(TAPS + 2 * C, c, inside), _load(TAPS + C, c, inside), _load(TAPS, c, inside)
    return r1, r2, r3


@triton.jit
def _d_pre(dy, x, e1, e2, e3, w0, w1, w2, w3, bias):
    """Gradient of the pre-activation, which is computed again."""
    p = bias + w3 * x + w2 * e1 + w1 * e2 + w0 * e3
    s = 1.0 / (1.0 + tl.exp(-p))
    return dy * (s + p * s * (1.0 - s))


@triton.jit
def _backward_step(
    new, dy, t, r0, r1, r2, g1, g2, g3, dw0, dw1, dw2, dw3, d_bias, d0, d1, d2,
    SEG, TAPS, DX, stride, C, c, inside, w0, w1, w2, w3, bias, num_tokens,
    RESETS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Token t. r0, r1, r2: x[t], x[t - 1], x[t - 2]; new: x[t - 3]. g1, g2, g3: d_pre of t + 1, t + 2, t + 3."""
    e1, e2, e3 = _seen(r1, r2, new, t, SEG, TAPS, C, c, inside, num_tokens, RESETS, SEGMENTS)
    g = _d_pre(dy, r0, e1, e2, e3, w0, w1, w2, w3, bias)
    dx = w3 * g + w2 * g1 + w1 * g2 + w0 * g3
    tl.store(DX + t * stride + c, dx.to(DX.dtype.element_ty), mask=inside & (t < num_tokens))
    dw3 += g * r0
    dw2 += g * e1
    dw1 += g * e2
    dw0 += g * e3
    d_bias += g
    g1, g2, g3 = g, g1, g2
    if RESETS:  # noqa: SIM102
        if (t == 0) | _start(SEG, t, num_tokens, SEGMENTS):
            d2 += w2 * g1 + w1 * g2 + w0 * g3
            d1 += w1 * g1 + w0 * g2
            d0 += w0 * g1
            g1, g2, g3 = g1 * 0, g2 * 0, g3 * 0
    return r1, r2, new, g1, g2, g3, dw0, dw1, dw2, dw3, d_bias, d0, d1, d2


@triton.jit
def _backward_chunk(
    X, W, BIAS, TAPS, SEG, DY, DX, PARTIAL, DTAPS, stride_x, stride_dy, stride_dx, first, num_tokens, C, c, inside,
    write_taps, CHUNK: tl.constexpr, BC: tl.constexpr, RESETS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """From the last token to the first. g1, g2, g3: d_pre one, two, three tokens on, zero past the document's end."""
    w0, w1, w2, w3, bias = _weights(W, BIAS, c, inside)
    g1, g2, g3 = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    last = first + CHUNK
    r0 = _load(X + (last + 2) * stride_x, c, inside & (last + 2 < num_tokens))
    r1 = _load(X + (last + 1) * stride_x, c, inside & (last + 1 < num_tokens))
    r2 = _load(X + last * stride_x, c, inside & (last < num_tokens))
    for i in tl.static_range(3):  # the next chunk's first tokens, last of them first
        t = last + 2 - i
        new = _input(X, TAPS, t - 3, stride_x, C, c, inside, num_tokens, RESETS)
        dy = _load(DY + t * stride_dy, c, inside & (t < num_tokens))
        e1, e2, e3 = _seen(r1, r2, new, t, SEG, TAPS, C, c, inside, num_tokens, RESETS, SEGMENTS)
        g1, g2, g3 = _d_pre(dy, r0, e1, e2, e3, w0, w1, w2, w3, bias), g1, g2
        r0, r1, r2 = r1, r2, new
        if RESETS and SEGMENTS:  # noqa: SIM102
            if _start(SEG, t, num_tokens, SEGMENTS):
                g1, g2, g3 = g1 * 0, g2 * 0, g3 * 0
    dw0, dw1 = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    dw2, dw3 = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    d_bias = tl.zeros([BC], tl.float32)
    d0, d1, d2 = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    # Chunks with a start are few: one token a round, which keeps the other path's registers.
    LOADS: tl.constexpr = 1 if RESETS else 4
    for turn in range(0, CHUNK // LOADS):
        top = last - 1 - LOADS * turn
        x0 = _input(X, TAPS, top - 3, stride_x, C, c, inside, num_tokens, RESETS)
        dy0 = _load(DY + top * stride_dy, c, inside & (top < num_tokens))
        if LOADS == 4:
            x1 = _input(X, TAPS, top - 4, stride_x, C, c, inside, num_tokens, RESETS)
            x2 = _input(X, TAPS, top - 5, stride_x, C, c, inside, num_tokens, RESETS)
            x3 = _input(X, TAPS, top - 6, stride_x, C, c, inside, num_tokens, RESETS)
            dy1 = _load(DY + (top - 1) * stride_dy, c, inside & (top - 1 < num_tokens))
            dy2 = _load(DY + (top - 2) * stride_dy, c, inside & (top - 2 < num_tokens))
            dy3 = _load(DY + (top - 3) * stride_dy, c, inside & (top - 3 < num_tokens))
        for i in tl.static_range(LOADS):
            if i == 0:
                new, dy = x0, dy0
            elif i == 1:
                new, dy = x1, dy1
            elif i == 2:
                new, dy = x2, dy2
            else:
                new, dy = x3, dy3
            r0, r1, r2, g1, g2, g3, dw0, dw1, dw2, dw3, d_bias, d0, d1, d2 = _backward_step(
                new, dy, top - i, r0, r1, r2, g1, g2, g3, dw0, dw1, dw2, dw3, d_bias, d0, d1, d2,
                SEG, TAPS, DX, stride_dx, C, c, inside, w0, w1, w2, w3, bias, num_tokens, RESETS, SEGMENTS,
            )  # fmt: skip
    tl.store(PARTIAL + c, dw0, mask=inside)
    tl.store(PARTIAL + C + c, dw1, mask=inside)
    tl.store(PARTIAL + 2 * C + c, dw2, mask=inside)
    tl.store(PARTIAL + 3 * C + c, dw3, mask=inside)
    tl.store(PARTIAL + 4 * C + c, d_bias, mask=inside)
    tl.store(DTAPS + c, d0, mask=inside & write_taps)
    tl.store(DTAPS + C + c, d1, mask=inside & write_taps)
    tl.store(DTAPS + 2 * C + c, d2, mask=inside & write_taps)


@triton.jit
def conv_backward(
    X, W, BIAS, TAPS, SEG, DY, DX, PARTIAL, DTAPS,
    num_tokens, C, batch_x, stride_x, batch_t, batch_dy, stride_dy, batch_dx, stride_dx,
    CHUNK: tl.constexpr, BC: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """DX; PARTIAL [B, chunks, 5, C]: what each chunk adds to the gradients of the four weights and the bias.

    DTAPS [B, chunks, 3, C] likewise for the taps; without SEGMENTS [B, 1, 3, C], from the first chunk.
    """
    b = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < C
    chunk = tl.program_id(1).to(tl.int64)
    first = chunk * CHUNK
    X, DY, DX = X + b * batch_x, DY + b * batch_dy, DX + b * batch_dx
    TAPS, SEG = TAPS + b * batch_t, SEG + b * num_tokens
    line = b * tl.num_programs(1) + chunk
    PARTIAL += line * 5 * C
    DTAPS += (line if SEGMENTS else b) * 3 * C
    write_taps = chunk == 0
    if SEGMENTS:
        write_taps = chunk >= 0
    resets = _has_start(SEG, first - 2, first + CHUNK + 2, num_tokens, 2 * CHUNK, SEGMENTS)
    if resets:
        _backward_chunk(
            X, W, BIAS, TAPS, SEG, DY, DX, PARTIAL, DTAPS, stride_x, stride_dy, stride_dx, first, num_tokens, C, c,
            inside, write_taps, CHUNK, BC, True, SEGMENTS,
        )  # fmt: skip
    else:
        _backward_chunk(
            X, W, BIAS, TAPS, SEG, DY, DX, PARTIAL, DTAPS, stride_x, stride_dy, stride_dx, first, num_tokens, C, c,
            inside, write_taps, CHUNK, BC, False, SEGMENTS,
        )  # fmt: skip
