"""The Megatron-Core model against the numbers of the published code, and against the oracle where that has no say."""

from dataclasses import replace

import pytest
import torch

from hymba_train.config.schema import Config, ModelConfig
from hymba_train.describe import model_tensors
from hymba_train.model import build_model_chunks
from hymba_train.oracle import OracleHymba
from tests import golden_data


def build(model_config, runtime, **precision):
    """The whole model in one chunk, float32."""
    config = Config(model=model_config)
    config.precision.params = "float32"
    for key, value in precision.items():
        setattr(config.precision, key, value)
    return build_model_chunks(config, runtime, [range(model_config.num_layers)])[0]


def on_device(case, device):
    """The case's tensors and weights there."""
    move = lambda tensors: {k: t.to(device) for k, t in tensors.items()}  # noqa: E731
    return replace(case, tensors=move(case.tensors), weights=move(case.weights))


def load(model, weights) -> None:
    with torch.no_grad():
        for name, param, _, cut in model.described_parameters():
            param.copy_(cut.take(weights[name]))


def gradients(model) -> dict:
    """By our names, true shapes."""
    out = {}
    for name, param, description, cut in model.described_parameters():
        if not cut.slices:
            out[name] = param.grad
            continue
        parts = [param.grad.narrow(description.axis, s.local_start, s.count) for s in cut.slices]
        out[name] = torch.cat(parts, dim=description.axis)
    return out


class Recorder:
    """Outputs of the modules whose values the golden data hold, [N, 1, ...] rows as the model has them."""

    def __init__(self, model) -> None:
        self.rows = {}

        def keep(key, take=lambda out: out):
            return lambda module, args, out: self.rows.update({key: take(out)})

        model.embedding.register_forward_hook(keep("hidden.embed_meta"))
        model.embedding.word_embeddings.register_forward_hook(keep("embeddings"))
        model.final_norm.register_forward_hook(keep("hidden.final_norm", lambda out: out[1]))
        for i, layer in enumerate(model.decoder.layers):
            layer.register_forward_hook(keep(f"hidden.layer{i}", lambda out: out[0] + out[1]))
            layer.mixer.attention.register_forward_hook(keep(f"inner.layer{i}.attn_branch"))
            layer.mixer.ssm.register_forward_hook(keep(f"inner.layer{i}.ssm_branch"))
            layer.mixer.register_forward_hook(lambda module, args, out, i=i: self.rows.update(self._kv(i, out[1])))

    @staticmethod
    def _kv(i, kv):
        return {} if kv is None else {f"inner.layer{i}.shared_key": kv[0], f"inner.layer{i}.shared_value": kv[1]}

    def full(self, name: str, num_meta: int, like: torch.Tensor) -> torch.Tensor:
        """Rows as the published code has them: [B, M+T, ...], or [B, heads, M+T, ...] for keys and values."""
        rows, batch = self.rows[name][:, 0], like.shape[0]
        meta, text = rows[:num_meta].expand(batch, num_meta, -1), rows[num_meta:].unflatten(0, (batch, -1))
        full = torch.cat((meta, text), dim=1)
        if "shared" in name:
            full = full.unflatten(-1, (like.shape[1], -1)).transpose(1, 2)
        return full


@pytest.fixture(params=golden_data.cases(), scope="module")
def golden(request, lone_runtime):
    case = golden_data.load(request.param)
    model = build(case.config, lone_runtime)
    load(model, case.weights)
    return case, model


def forward_backward(case, model, prefix=""):
    """(recorder, loss, gradients as padding_idx would make them) of a golden batch."""
    tokens = case.tensors[prefix + "input_ids"]
    labels = golden_data.shifted(case.tensors[prefix + "labels"])
    recorder = Recorder(model)
    model.zero_grad()
    losses = model(tokens, labels)
    recorder.rows["embeddings"].retain_grad()
    loss = losses.sum() / (labels != -100).sum()
    loss.backward()
    found = gradients(model)
    name = "embedding.word_embeddings.weight"
    found[name] = golden_data.without_pad_lookup(found[name], tokens, recorder.rows["embeddings"].grad, case.pad_id)
    return recorder, loss, found


def test_logits(golden):
    case, model = golden
    with torch.no_grad():
        logits = model(case.tensors["input_ids"])
    assert logits.shape == case.tensors["logits"].shape  # the padded vocabulary never leaves
    assert (logits - case.tensors["logits"]).abs().max() <= case.tolerance["logits_max_abs"]


def test_loss_activations_and_gradients(golden):
    case, model = golden
    recorder, loss, found = forward_backward(case, model)
    assert abs(loss - case.tensors["loss"]) <= case.tolerance["loss_abs"]
    num_meta, checked = case.config.num_meta_tokens, 0
    for name, expected in case.tensors.items():
        if name.startswith(("hidden.", "inner.")):
            error = (recorder.full(name, num_meta, expected) - expected).abs().max()
            if name.startswith("hidden."):
                assert error <= case.tolerance["hidden_max_abs"][name.removeprefix("hidden.")], name
            else:
                assert error / expected.abs().max() <= case.tolerance["inner_max_abs_over_max"], name
            checked += 1
    assert checked == 11
    case.check_gradients(found)


def test_padding_is_ordinary_text(golden):
    """The training side of case c: a mask has no effect there, padding tokens are tokens."""
    case, model = golden
    if "padded.logits" not in case.tensors:
        pytest.skip("only case c has a padded batch")
    with torch.no_grad():
        logits = model(case.tensors["padded.input_ids"])
    assert (logits - case.tensors["padded.logits"]).abs().max() <= case.tolerance["logits_max_abs"]
    _, loss, found = forward_backward(case, model, "padded.")
    assert abs(loss - case.tensors["padded.loss"]) <= case.tolerance["loss_abs"]
    case.check_gradients(found, "padded.grad.")


STACKS = {
    "attention": dict(layer_pattern=["attention"], kv_groups=[[1, 2]], global_layers=[0, 3]),
    "ssm": dict(layer_pattern=["ssm"]),
    "ssm_without_ffn": dict(layer_pattern=["ssm:no_ffn"], num_meta_tokens=0),
    "sequential": dict(layer_pattern=["ssm:no_ffn", "attention"], global_layers=[1]),
    "hybrid": dict(layer_pattern=["hybrid"], kv_groups=[[1, 2]], global_layers=[0, 3]),
    "concat": dict(branch_fusion="concat", kv_groups=[[1, 2]], global_layers=[0, 3], kv_channels=8, v_head_dim=6),
    "llama": dict(layer_pattern=["attention"], v_head_dim=12, num_query_groups=4, window_size=None, num_meta_tokens=0),
    "mamba2": dict(layer_pattern=["mamba2:no_ffn"], mamba2_head_dim=16, mamba2_state_dim=8),
    "mamba2_groups": dict(
        layer_pattern=["mamba2", "attention"],
        mamba2_head_dim=8,
        mamba2_state_dim=4,
        mamba2_num_groups=3,
        num_meta_tokens=0,
    ),
}


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("documents", [False, True], ids=["whole", "packed"])
def test_every_stack_equals_the_oracle(stack, documents, lone_runtime):
    """Logits, loss and gradients, with packed documents too."""
    sizes = dict(
        num_layers=4, hidden_size=48, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2, vocab_size=61
    )
    window = dict(window_size=5, num_meta_tokens=3)
    config = ModelConfig(name=stack, **{**sizes, **window, **STACKS[stack]})
    model = build(config, lone_runtime)
    oracle = OracleHymba(config)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in oracle.parameters():  # away from initial ones and zeros
            p.copy_(torch.randn_like(p) * 0.3 + (0.5 if p.dim() == 1 else 0))
    load(model, oracle.state_dict())
    tokens = torch.randint(0, 61, (2, 17))
    labels = torch.randint(0, 61, (2, 17))
    labels[0, 3] = -100
    segments = positions = None
    if documents:
        segments = torch.tensor([[0] * 6 + [1] * 11, [0] * 1 + [1] * 9 + [2] * 7])
        positions = torch.cat([torch.arange(n) for n in (6, 11, 1, 9, 7)]).view(2, 17)
    losses = model(tokens, labels, positions, segments)
    expected = oracle(tokens, labels, segment_ids=segments)
    (losses.sum() / (labels != -100).sum()).backward()
    expected.loss.backward()
    assert torch.allclose(losses.sum() / (labels != -100).sum(), expected.loss, rtol=1e-5)
    found, reference = gradients(model), dict(oracle.named_parameters())
    assert found.keys() == reference.keys() == {t.name for t in model_tensors(config)}
    for name, gradient in found.items():
        scale = reference[name].grad.abs().max()
        assert (gradient - reference[name].grad).abs().max() <= 1e-4 * scale, name
