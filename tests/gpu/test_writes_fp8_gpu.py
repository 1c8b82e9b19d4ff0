"""A gated FFN in FP8 whose SwiGLU writes FP8 itself, against one whose products cast: the same bits everywhere."""

import pytest
import torch

from hymba_train.config import compose

pytestmark = pytest.mark.gpu

ROWS, HIDDEN, FFN, STEPS = 48, 64, 96, 4  # FP8 products want multiples of 16
OVERRIDES = [
    "model=hymba_tiny", f"model.hidden_size={HIDDEN}", f"model.ffn_hidden_size={FFN}", "precision=bf16",
    "precision.fp8=delayed", "precision.layer_spec=transformer_engine",
]  # fmt: skip


@pytest.fixture
def ffns(gpu_runtime):
    """(TransformerConfig, the FFN as a run builds it, one of the same weights with plain SwiGLU)."""
    from megatron.core.transformer.spec_utils import build_module

    from hymba_train.model.config import hymba_config
    from hymba_train.model.layer_specs import layer_spec
    from hymba_train.model.ops import select_ops

    config, device = compose(OVERRIDES), gpu_runtime.device
    transformer = hymba_config(config, device)
    ops = select_ops(config, device, torch.bfloat16)
    assert "writes FP8" in ops.description
    spec = layer_spec("transformer_engine", "cuda", torch.bfloat16).submodules.ffn
    built = []
    with torch.device(device):
        for _ in range(2):
            built.append(build_module(spec, transformer, swiglu_op=ops.swiglu, pg_collection=gpu_runtime.groups))
    generator = torch.Generator(device).manual_seed(3)
    for pair in zip(*(ffn.parameters() for ffn in built), strict=True):
        value = 0.2 * torch.randn(pair[0].shape, generator=generator, device=device)
        for param in pair:
            param.data.copy_(value)
    fused, plain = built
    assert fused.swiglu_op is not ops.swiglu
    plain.swiglu_op = ops.swiglu
    return transformer, fused, plain


def test_every_bit_is_that_of_casts_afterwards(ffns, monkeypatch):
    """Output, gradients, scales and histories over some steps, in which the scales move; and fewer casts are made."""
    from megatron.core.fp8_utils import get_fp8_context
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer, Float8Tensor

    config, *both = ffns
    casts, handed_on = [], []
    of_te = Float8Quantizer.quantize_impl
    monkeypatch.setattr(Float8Quantizer, "quantize_impl", lambda q, t: casts.append(t.shape) or of_te(q, t))
    both[0].linear_fc2.register_forward_pre_hook(lambda _, args: handed_on.append(args[0]))
    generator = torch.Generator("cuda").manual_seed(5)
    scales = []
    for step in range(STEPS):
        shape, size = (ROWS, 1, HIDDEN), 10.0 ** (step - 1)
        x, d_out = (size * torch.randn(shape, generator=generator, device="cuda").bfloat16() for _ in range(2))
        inputs = [x.clone().requires_grad_() for _ in both]
        with get_fp8_context(config):  # one region: Transformer Engine moves all scales when it is left
            outputs, made = [], []
            for ffn, given in zip(both, inputs, strict=True):
                casts.clear()
                outputs.append(ffn(given))
                made.append(len(casts))
        assert made[1] == made[0] + 1  # weights are cast in the first step alone
        assert torch.equal(*outputs)
        casts.clear()
        torch.autograd.backward(outputs, [d_out, d_out])
        assert len(casts) == 1 + 2  # the gradients of linear_fc2's output, and of linear_fc1's in the plain one
        assert torch.equal(*(given.grad for given in inputs))
        for of_fused, of_plain in zip(*(ffn.parameters() for ffn in both), strict=True):
            assert of_fused.grad.abs().max() > 0 and torch.equal(of_fused.grad, of_plain.grad)
            of_fused.grad = of_plain.grad = None
        kept = [memory_of(ffn) for ffn in both]
        assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
        scales.append(kept[0][0].clone())
    assert all(type(t) is Float8Tensor for t in handed_on)
    assert not torch.equal(scales[0], scales[-1])


def memory_of(ffn) -> list[torch.Tensor]:
    """Scales and histories of both products, both directions."""
    states = [m.fp8_meta[key] for m in (ffn.linear_fc2, ffn.linear_fc1) for key in ("scaling_fwd", "scaling_bwd")]
    return [tensor for state in states for tensor in (state.scale, state.amax_history)]


def test_without_gradients(ffns):
    from megatron.core.fp8_utils import get_fp8_context

    config, fused, plain = ffns
    x = torch.randn(ROWS, 1, HIDDEN, device="cuda").bfloat16()
    with torch.no_grad(), get_fp8_context(config):
        assert torch.equal(fused(x), plain(x))


def test_what_is_kept_is_one_byte_a_value(ffns):
    """FP8 without its transpose, which the backward pass makes: as much as a cast's transpose without what it is of."""
    from megatron.core.fp8_utils import get_fp8_context

    config, fused, _ = ffns
    kept = []
    fused.linear_fc2.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    x = torch.randn(ROWS, 1, HIDDEN, device="cuda").bfloat16().requires_grad_()
    with get_fp8_context(config):
        fused(x)
    data, transpose = kept[0].get_data_tensors()
    assert (data.dtype, data.shape, transpose) == (torch.uint8, (ROWS, 1, FFN), None)
