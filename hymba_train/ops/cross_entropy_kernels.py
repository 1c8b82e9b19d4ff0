"""Triton kernels of the cross-entropy; launched by :mod:`hymba_train.ops.cross_entropy_triton`."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def loss_forward(LOGITS, LABELS, LOSS, LSE2, stride, vocab_size, BLOCK: tl.constexpr):
    """LSE2 = log2 of the row's sum of exponentials; LOSS = log-sum-exp - logit of the label, 0 where that is < 0."""
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * stride
    c = tl.arange(0, BLOCK)
    largest = -float("inf")
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        x = tl.load(LOGITS + start + c, mask=start + c < vocab_size, other=-float("inf")).to(tl.float32) * LOG2_E
        new = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp2(largest - new) + tl.exp2(x - new)
        largest = new
    lse2 = largest + tl.log2(tl.sum(total, 0))
    label = tl.load(LABELS + row)
    predicted = label >= 0
    logit = tl.load(LOGITS + label, mask=predicted, other=0.0).to(tl.float32)
    tl.store(LSE2 + row, lse2)
    tl.store(LOSS + row, tl.where(predicted, lse2 * LN_2 - logit, 0.0))


@triton.jit
def loss_backward(LOGITS, LABELS, LSE2, DLOSS, stride, vocab_size, padded_size, BLOCK: tl.constexpr):
    """In place: LOGITS becomes its own gradient, (softmax - one-hot of the label) dloss; zero in padding columns."""
    row = tl.program_id(0).to(tl.int64)  # the first axis may have more than 65,535
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(LABELS + row)
    d_loss = tl.where(label >= 0, tl.load(DLOSS + row), 0.0)
    lse2 = tl.load(LSE2 + row)
    place = LOGITS + row * stride + c
    x = tl.load(place, mask=c < vocab_size, other=-float("inf")).to(tl.float32)
    gradient = (tl.exp2(x * LOG2_E - lse2) - tl.where(c == label, 1.0, 0.0)) * d_loss
    tl.store(place, gradient.to(LOGITS.dtype.element_ty), mask=c < padded_size)
