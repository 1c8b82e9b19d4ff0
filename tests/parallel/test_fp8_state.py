"""The memory of FP8's delayed scaling, in place: remembered, taken back, left alone; and the modules it belongs to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hymba_train.parallel import fp8_state
from hymba_train.parallel.fp8_state import Fp8State
from tests.parallel.fake_fp8 import memory, move_on, note


@pytest.fixture
def modules():
    return {
        name: SimpleNamespace(fp8_meta={"recipe": None, "scaling_fwd": memory(3), "scaling_bwd": memory(2)})
        for name in ("a", "b")
    }


def move(modules) -> None:
    for module in modules.values():
        for state in (module.fp8_meta["scaling_fwd"], module.fp8_meta["scaling_bwd"]):
            note(state, torch.randn(5))
            move_on(state)
            note(state, torch.tensor([torch.nan]))


def copy(state) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in state.tensors().items()}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(-1), b[k].nan_to_num(-1)) for k in a)


def test_it_goes_back_in_place_as_often_as_wanted(modules):
    state = Fp8State(modules)
    views = {name: t[0] for name, t in state.tensors().items()}  # as quantizers have them
    move(modules)
    for _ in range(2):  # the second one reuses the memory of the first
        before = copy(state)
        state.remember()
        for _ in range(2):
            move(modules)
            assert not equal(copy(state), before)
            state.go_back()
            assert equal(copy(state), before)
        move(modules)
    assert all(views[name].data_ptr() == t.data_ptr() for name, t in state.tensors().items())


def test_what_runs_untouched_leaves_no_trace_even_if_it_fails(modules):
    state = Fp8State(modules)
    move(modules)
    before = copy(state)
    with pytest.raises(RuntimeError), state.untouched():
        move(modules)
        raise RuntimeError
    assert equal(copy(state), before)


def test_reset_is_a_new_run(modules):
    state = Fp8State(modules)
    new = copy(state)
    move(modules)
    state.reset()
    assert equal(copy(state), new)
    assert set(new) == {f"{m}.{k}_{d}" for m in "ab" for k in ("scale", "amax_history") for d in ("fwd", "bwd")}


@pytest.mark.parametrize("meta", [{}, {"scaling_fwd": SimpleNamespace(dtype="e4m3"), "scaling_bwd": None}])
def test_other_recipes_have_none(meta):
    """A module in bf16, or one of current scaling, whose recipe state has no tensors."""
    state = Fp8State({"a": SimpleNamespace(fp8_meta=meta)})
    assert state.tensors() == {}
    state.remember()
    state.go_back()
    state.reset()
    with state.untouched():
        pass


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta, self.asked = {}, []

    def init_fp8_metadata(self, num_gemms: int) -> None:
        self.asked.append((num_gemms, torch.is_grad_enabled()))


def model_of(first_layer: int, fp8) -> torch.nn.Module:
    layers = torch.nn.ModuleList()
    for number in range(2):
        layer = torch.nn.Module()
        layer.layer, layer.in_proj = SimpleNamespace(index=first_layer + number), Linear()
        layers.append(layer)
    model = torch.nn.Module()
    model.decoder, model.config = torch.nn.Module(), SimpleNamespace(fp8=fp8)
    model.decoder.layers = layers
    return model


def test_names_have_the_layers_global_numbers():
    assert list(Fp8State.of([model_of(0, None), model_of(4, None)]).modules) == [
        f"decoder.layers.{n}.in_proj" for n in (0, 1, 4, 5)
    ]


def test_it_is_made_before_the_first_forward_pass_and_does_not_move(monkeypatch):
    import contextlib

    from megatron.core import fp8_utils

    monkeypatch.setattr(fp8_utils, "get_fp8_context", lambda config: contextlib.nullcontext())
    models = [model_of(0, "hybrid"), model_of(2, None)]
    fp8_state.prepare(models)
    asked = [layer.in_proj.asked for model in models for layer in model.decoder.layers]
    assert asked == [[(1, False)], [(1, False)], [], []]
