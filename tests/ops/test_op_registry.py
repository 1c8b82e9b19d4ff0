"""Choice of backends."""

import inspect

import pytest
import torch

from hymba_train.errors import UserError
from hymba_train.ops import BACKENDS, registry, select


def test_auto_takes_the_first_that_can_and_says_what_it_passed_over():
    choice = select("attention", "auto", "cpu", needs={"segment_ids"})
    assert choice.name == "torch"
    assert choice.description.startswith("attention: torch on cpu (auto; cudnn needs the package ")
    assert choice.description.endswith("; flex runs on cuda, not on cpu)")
    assert select("attention", "auto", "cuda").name == "flex"
    assert select("attention", "auto", "cuda", dtype=torch.float64).name == "torch"
    assert select("attention", "auto", "cuda", needs={"deterministic"}).name == "torch"


def test_a_package_that_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    choice = select("selective_scan", "auto", "cuda")
    assert choice.name == "torch"
    assert "triton needs the package triton" in choice.description
    with pytest.raises(UserError, match=r"'triton' needs the package triton; use 'torch'$"):
        select("selective_scan", "triton", "cuda")


def test_an_explicit_choice_never_falls_back():
    assert select("selective_scan", "reference", "cpu").description == "selective_scan: reference on cpu (as asked)"
    with pytest.raises(UserError, match=r"^attention: backend 'flex' runs on cuda, not on cpu; use 'torch'$"):
        select("attention", "flex", "cpu")
    with pytest.raises(UserError, match=r"backend 'flex' has no float64, has no bitwise .*; use 'torch'$"):
        select("attention", "flex", "cuda", needs={"deterministic"}, dtype=torch.float64)
    with pytest.raises(UserError, match=r"there is no backend 'fast'; known are cudnn, .* and auto; use 'torch'$"):
        select("attention", "fast", "cpu")


def test_nothing_can():
    with pytest.raises(
        UserError, match=r"no backend of causal_conv_rows can do this on tpu: triton .*; torch runs on cpu and cuda"
    ):
        select("causal_conv_rows", "auto", "tpu")


def test_mistakes_of_the_caller_are_not_user_errors():
    with pytest.raises(ValueError, match="needs are"):
        select("attention", "auto", "cpu", needs={"segments"})
    with pytest.raises(ValueError, match="ops are"):
        select("convolution", "auto", "cpu")


def test_backends_of_an_op_share_its_signature():
    for op, backends in BACKENDS.items():
        signatures = set()
        for backend in backends:
            assert backend.op == op
            if all(registry.is_importable(p) for p in backend.requires):
                parameters = inspect.signature(backend.function).parameters.values()
                signatures.add(tuple((p.name, p.kind, p.default) for p in parameters))
        assert len(signatures) == 1, op


def test_a_choice_is_called_like_the_op():
    conv = select("causal_conv_rows", "auto", "cpu", needs={"segment_ids"})
    out = conv(torch.zeros(5, 3), torch.zeros(3, 4), torch.ones(3), num_meta=1, batch=2, seq=2)
    torch.testing.assert_close(out, torch.nn.functional.silu(torch.ones(5, 3)))
