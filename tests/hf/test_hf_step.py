"""The one-token step, the scan and the optional kernels, as far as a CPU can hold them to account."""

import pytest
import torch

from hymba_train.hf import modeling_hymba
from hymba_train.hf.modeling_hymba import HymbaCache, HymbaDecoderLayer, scan
from tests.hf_models import make_model


def filled(model, num_tokens=12, batch=2):
    """(cache after num_tokens random tokens, embeddings of a next token)"""
    torch.manual_seed(3)
    ids = torch.randint(3, 61, (batch, num_tokens + 1))
    cache = HymbaCache(model.config, max_length=num_tokens + 8)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache, use_cache=True)
        return cache, model.get_input_embeddings()(ids[:, -1:])


def tensors(cache):
    return [t for e in cache.kv.values() for t in e] + [*cache.conv.values(), *cache.ssm.values(), cache.lengths]


def test_a_step_reads_nothing_back_and_makes_no_tensor_of_another_device(small):
    """On the meta device any .item(), data-dependent shape or stray CPU tensor is an error: what breaks a capture."""
    model = make_model()
    cache, embeds = filled(model)
    model.to("meta")
    for entry in cache.kv.values():
        entry[:] = [t.to("meta") for t in entry]
    for kept in (cache.conv, cache.ssm):
        kept.update({i: t.to("meta") for i, t in kept.items()})
    cache.lengths = cache.lengths.to("meta")
    with torch.no_grad():
        assert model.model.step(embeds.to("meta"), cache).shape == (2, 1, 32)


def test_a_step_writes_where_the_step_before_it_may_be_repeated(small):
    """Capture runs the step several times: with lengths and states put back, the next real step is as if it had not."""
    cache, embeds = filled(small)
    again, _ = filled(small)
    states = [again.lengths, *again.conv.values(), *again.ssm.values()]
    saved = [t.clone() for t in states]
    with torch.no_grad():
        for _ in range(3):
            small.model.step(embeds + 1, again)
            for t, value in zip(states, saved, strict=True):
                t.copy_(value)
        assert torch.equal(small.model.step(embeds, again), small.model.step(embeds, cache))
    assert all(torch.equal(a, b) for a, b in zip(tensors(again), tensors(cache), strict=True))


@pytest.fixture
def graphs(monkeypatch):
    """Those that the compiled step is made into; they run as they are."""
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    # Training on a CPU turns dynamo off for the whole process, twice (parallel/device.py).
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(disable=False):
        compiled = torch.compile(HymbaDecoderLayer.step, backend=backend, fullgraph=True)
        monkeypatch.setattr(modeling_hymba, "_compiled_layer_step", lambda: compiled)
        yield found
    torch._dynamo.reset()


def test_the_layer_step_compiles_whole(graphs):
    """One graph a kind of layer (global; producer; consumer), shared by all layers of the kind."""
    model = make_model(decode_backend="compile")
    cache, embeds = filled(model)
    other, _ = filled(model)
    found = model.model.step(embeds, cache)
    assert len(graphs) == 3
    model.config.decode_backend = "eager"
    torch.testing.assert_close(found, model.model.step(embeds, other), rtol=0, atol=1e-10)


@pytest.mark.slow
def test_compiled_steps_of_many_shapes_and_types(graphs):
    """Few graphs serve all batches and lengths; two types make more than the 8 that torch allows by default."""
    for dtype in (torch.float64, torch.float32):
        model = make_model(dtype=dtype, decode_backend="compile")
        for batch in (1, 2, 3, 8, 17):
            for num_tokens in (4, 12, 30):
                cache, embeds = filled(model, num_tokens, batch)
                model.model.step(embeds, cache)
    assert 8 < len(graphs) <= 12


def test_the_norm_of_inference_is_that_of_training():
    """In bf16 too, where it matters that the result is rounded before it is scaled."""
    torch.manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        norm = modeling_hymba.HymbaRMSNorm(96, 1e-6).to(dtype)
        x = (torch.randn(50, 96) * 3).to(dtype)
        with torch.no_grad():
            norm.weight.normal_()
            fused = norm(x)
        torch.testing.assert_close(fused, norm(x), rtol=0 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("lanes", [2, 3, 7, 20])
def test_scan_in_lanes_equals_scan_in_order(lanes):
    torch.manual_seed(0)
    delta, du = torch.rand(2, 19, 6, dtype=torch.float64), torch.randn(2, 19, 6, dtype=torch.float64)
    A, state = -torch.rand(6, 4, dtype=torch.float64) * 3, torch.randn(2, 6, 4, dtype=torch.float64)
    B, C = torch.randn(2, 2, 19, 4, dtype=torch.float64)
    h, expected = state, []
    for t in range(19):
        h = torch.exp(delta[:, t, :, None] * A) * h + du[:, t, :, None] * B[:, t, None]
        expected.append((h * C[:, t, None]).sum(-1))
    for found, last in (scan(delta, du, A, B, C, state), scan(delta, du, A, B, C, state, lanes)):
        torch.testing.assert_close(found, torch.stack(expected, 1), rtol=0, atol=1e-12)
        torch.testing.assert_close(last, h, rtol=0, atol=1e-12)


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """What mamba-ssm documents: u, delta, z [b, e, s]; B, C [b, n, s]; delta_bias [e]."""
    assert delta_softplus and return_last_state
    delta = torch.nn.functional.softplus(delta + delta_bias[:, None])
    h, ys = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype), []
    for t in range(u.shape[-1]):
        h = torch.exp(delta[..., t, None] * A) * h + (delta[..., t] * u[..., t])[..., None] * B[:, None, :, t]
        ys.append((h * C[:, None, :, t]).sum(-1) + D * u[..., t])
    return torch.stack(ys, -1) * torch.nn.functional.silu(z), h


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """What mamba-ssm documents: state [b, e, n] in place; x, dt, z [b, e]; B, C [b, n]."""
    assert dt_softplus
    dt = torch.nn.functional.softplus(dt + dt_bias)
    state.copy_(torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B[:, None])
    return ((state * C[:, None]).sum(-1) + D * x) * torch.nn.functional.silu(z)


def test_mamba_ssm_is_called_as_documented(small, monkeypatch):
    """With stand-ins of the documented signatures: prompts padded on either side, then steps, equal plain torch."""
    ids, mask = torch.randint(3, 61, (3, 14)), torch.ones(3, 14, dtype=torch.int64)
    mask[0, :5], mask[1, 9:] = 0, 0
    settings = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    settings |= dict(output_logits=True, return_dict_in_generate=True)
    expected = small.generate(ids, **settings)
    monkeypatch.setattr(modeling_hymba, "selective_scan_fn", selective_scan_fn)
    monkeypatch.setattr(modeling_hymba, "selective_state_update", selective_state_update)
    monkeypatch.setattr(modeling_hymba.HymbaMixer, "_use_kernels", lambda self, x: True)
    found = small.generate(ids, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=1e-9)


@pytest.mark.parametrize("window", [None, 6])
def test_the_block_mask_of_flex_attention_is_the_rule(window):
    """Every pair, for 3 meta tokens and 20 queries, and FlexAttention (uncompiled) with it against the plain blocks."""
    mask = modeling_hymba._block_mask(20, 3, window, torch.device("cpu"))
    for query in range(20):
        for key in range(23):
            distance = query - (key - 3)
            expected = key < 3 or (distance >= 0 and (window is None or distance <= window))
            assert bool(mask.mask_mod(0, 0, torch.tensor(query), torch.tensor(key))) == expected
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 16)
    meta_k, meta_v = torch.randn(2, 3, 8), torch.randn(2, 3, 16)
    keys, values = (torch.cat((m.expand(2, *m.shape), t), 2) for m, t in ((meta_k, k), (meta_v, v)))
    flex = modeling_hymba.flex_attention(q, keys, values, block_mask=mask, scale=1.0, enable_gqa=True)
    plain = modeling_hymba.attend(q, k, v, meta_k, meta_v, window, None, use_flex=False)
    torch.testing.assert_close(flex, plain, rtol=0, atol=1e-5)


def test_queries_in_blocks_equal_queries_at_once(monkeypatch):
    """300 tokens are three blocks on a CPU; logits of the first 100 cannot depend on that."""
    model = make_model(sliding_window=20, num_hidden_layers=3, global_attn_idx=[1], kv_reuse_group=[])
    ids = torch.randint(3, 61, (1, 300))
    with torch.no_grad():
        cache = HymbaCache(model.config)
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(100, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=0, atol=1e-10)
