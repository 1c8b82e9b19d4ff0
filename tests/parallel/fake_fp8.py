"""Linear layers with a memory like that of Transformer Engine's delayed scaling, on a CPU.

What Transformer Engine 2.20 does with it: a forward pass casts by the scales, and writes the largest values into row 0
of the history, also in evaluation; with gradients on, the history then moves on by a row, and the scales follow from
its maximum. Here, too; and the result of a layer depends on its scales, so that a wrong memory shows in the loss.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

HISTORY = 8


def memory(num_tensors: int) -> SimpleNamespace:
    return SimpleNamespace(scale=torch.ones(num_tensors), amax_history=torch.zeros(HISTORY, num_tensors))


def give_memory(model) -> None:
    """To in_proj and linear_fc1 of every layer of a HymbaModel."""
    for layer in model.decoder.layers:
        for module in (layer.mixer.in_proj, layer.ffn.linear_fc1):
            module.fp8_meta = {"fp8_checkpoint": True, "scaling_fwd": memory(3), "scaling_bwd": memory(2)}
            module.register_forward_pre_hook(cast)


def cast(module, args):
    forward, backward = module.fp8_meta["scaling_fwd"], module.fp8_meta["scaling_bwd"]
    x = args[0] * (1 + 0.05 * forward.scale[0])
    note(forward, x)
    if torch.is_grad_enabled():
        move_on(forward)
        x.register_hook(lambda gradient: back(backward, gradient))
    return (x, *args[1:])


def back(state, gradient):
    result = gradient * (1 + 0.05 * state.scale[0])
    note(state, gradient)
    move_on(state)
    return result


@torch.no_grad()
def note(state, x) -> None:
    state.amax_history[0] = torch.maximum(state.amax_history[0], x.detach().abs().max())


@torch.no_grad()
def move_on(state) -> None:
    state.scale.copy_(1 / state.amax_history.max(0).values)
    state.amax_history.copy_(torch.roll(state.amax_history, -1, 0))
    state.amax_history[0] = 0


def install() -> None:
    """In trainings of this process."""
    from hymba_train.train import main as training

    build = training.build_model_chunks

    def with_memory(*args, **kwargs):
        models = build(*args, **kwargs)
        for model in models:
            give_memory(model)
        return models

    training.build_model_chunks = with_memory
