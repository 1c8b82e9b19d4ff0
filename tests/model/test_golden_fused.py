"""The golden data through every fused backend at once, on a CPU: Triton interpreted, the CUDA scan emulated, cuDNN
computed plainly. What a GPU would run, but for its rounding and speed."""

import os

import pytest

from hymba_train.model import ops
from hymba_train.ops import attention_cudnn
from hymba_train.ops import selective_scan_cuda as scan
from hymba_train.ops.registry import BACKENDS, Choice
from tests import golden_data
from tests.model.test_golden import build, forward_backward, load
from tests.ops.emulator import emulated, needs_emulator
from tests.ops.fused import TRITON
from tests.ops.test_op_attention_cudnn import PlainCudnn

NAMES = {"attention": "cudnn", "selective_scan": "cuda"}  # of other ops: triton


def fused(op: str, *args, **kwargs) -> Choice:
    """In place of :func:`hymba_train.ops.select`, which would not let them run here."""
    name = NAMES.get(op, "triton")
    return Choice(next(b for b in BACKENDS[op] if b.name == name), "cpu", "test")


@needs_emulator
@pytest.mark.skipif(not TRITON or os.environ.get("TRITON_INTERPRET") != "1", reason="needs triton, TRITON_INTERPRET=1")
@pytest.mark.parametrize("name", golden_data.cases())
def test_loss_and_gradients(name, lone_runtime, monkeypatch):
    case, plain = golden_data.load(name), PlainCudnn(None)
    monkeypatch.setattr(attention_cudnn, "fused_forward", plain.forward)
    monkeypatch.setattr(attention_cudnn, "fused_backward", plain.backward)
    monkeypatch.setattr(scan, "_kernels", lambda x_dtype, bc_dtype, exact, device: emulated(x_dtype, bc_dtype, exact))
    monkeypatch.setattr(ops, "select", fused)
    monkeypatch.setattr(ops, "check_attention", lambda *args: [])  # float32, which cuDNN itself has not
    model = build(case.config, lone_runtime)
    load(model, case.weights)
    _, loss, gradients = forward_backward(case, model)
    assert abs(loss - case.tensors["loss"]) <= case.tolerance["loss_abs"]
    case.check_gradients(gradients)
