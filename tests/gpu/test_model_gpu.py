"""The Megatron-Core model on a GPU: golden data through the Transformer Engine spec and every GPU backend."""

import pytest
import torch

from tests import golden_data
from tests.model.test_golden import build, forward_backward, on_device

pytestmark = pytest.mark.gpu

BACKENDS = {
    "torch": dict(attention_backend="torch", scan_backend="torch"),
    "fast": dict(attention_backend="flex", scan_backend="triton"),
}


@pytest.fixture(scope="module")
def gpu_runtime():
    from hymba_train.config.schema import Config
    from hymba_train.parallel import initialize

    config = Config()
    config.run.device = "cuda"
    torch.backends.cuda.matmul.allow_tf32 = False
    return initialize(config)


@pytest.mark.parametrize("backends", BACKENDS)
@pytest.mark.parametrize("spec", ["local", "transformer_engine"])
@pytest.mark.parametrize("name", golden_data.cases())
def test_golden_in_float32(name, spec, backends, gpu_runtime):
    """Logits, loss and all gradients within the golden data's float32 tolerance."""
    case = on_device(golden_data.load(name), gpu_runtime.device)
    model = build(case.config, gpu_runtime, layer_spec=spec, **BACKENDS[backends])
    with torch.no_grad():
        for parameter_name, param, _, cut in model.described_parameters():
            param.copy_(cut.take(case.weights[parameter_name]))
        logits = model(case.tensors["input_ids"])
    assert (logits - case.tensors["logits"]).abs().max() <= case.tolerance["logits_max_abs"]
    _, loss, found = forward_backward(case, model)
    assert abs(loss - case.tensors["loss"]) <= case.tolerance["loss_abs"]
    cpu = golden_data.load(name)
    cpu.check_gradients({k: g.cpu() for k, g in found.items()})
