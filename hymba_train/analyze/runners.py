"""Prefill and one-token steps over a static cache, eagerly or captured as a CUDA graph: of a Hymba, and of the Llama
that it is measured beside."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CAPTURE_STEPS = 4  # of a CUDA graph: three tries and the capture


class HymbaRunner:
    """The same interface as LlamaRunner's."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def prefill(self, ids: Any, capacity: int) -> Any:
        """The cache after a prompt [B, S]."""
        from hymba_train.hf.modeling_hymba import HymbaCache

        cache = HymbaCache(self.model.config, max_length=capacity)
        self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def filled(self, batch: int, length: int, capacity: int) -> Any:
        """A cache of random content: made by a prefill of one token, then set to ``length``."""
        cache = self.prefill(torch.full((batch, 1), 5, device=self.model.device), capacity)
        for tensor in hymba_tensors(cache)[0]:
            tensor.normal_()
        cache.lengths.fill_(length)
        cache.seen = length
        return cache

    def sequence_bytes(self, cache: Any, batch: int) -> int:
        """Of one row; what all rows share (keys and values of meta tokens) counts whole, as for a lone sequence."""
        rows, shared = hymba_tensors(cache)
        return sum(t.nbytes for t in rows) // batch + sum(t.nbytes for t in shared)

    def step(self, cache: Any, batch: int, length: int, capacity: int, graph: bool) -> Callable[[Any], Any]:
        """As :meth:`LlamaRunner.step`."""

        def step(token: Any) -> Any:
            self.model.config.decode_backend = "graph" if graph else "eager"
            token = self.model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            if graph and cache.graph is None:
                raise RuntimeError("the step was not captured")
            return token

        return step


def hymba_tensors(cache: Any) -> tuple[list[Any], list[Any]]:
    """All of a HymbaCache but the 8 bytes a row that count its tokens: (of each row, shared by all rows)."""
    rows = [t for entry in cache.kv.values() for t in entry[:2]] + [*cache.conv.values(), *cache.ssm.values()]
    return rows, [t for entry in cache.kv.values() for t in entry[2:]]


class LlamaRunner:
    """Prefill and one-token steps over a static cache of ``capacity`` slots."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.takes_position = "cache_position" in inspect.signature(type(model.model).forward).parameters

    def new_cache(self, batch: int, capacity: int) -> Any:
        """An empty static cache for ``batch`` rows of ``capacity`` tokens."""
        from transformers import StaticCache

        model = self.model
        return StaticCache(
            config=model.config, max_batch_size=batch, max_cache_len=capacity, device=model.device, dtype=model.dtype
        )

    def prefill(self, ids: Tensor, capacity: int) -> Any:
        """The cache after a prompt [B, S]."""
        cache = self.new_cache(len(ids), capacity)
        place = {"cache_position": torch.arange(ids.shape[1], device=ids.device)} if self.takes_position else {}
        self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **place)
        return cache

    def filled(self, batch: int, length: int, capacity: int) -> Any:
        """A cache as after ``length`` tokens of random content, without the prefill: what steps cost does not depend
        on what a cache holds."""
        cache = self.new_cache(batch, capacity)
        step = LlamaStep(self, cache, batch, 0, capacity)
        step.hidden_states()  # makes the buffers
        for tensor in cache_tensors(cache):
            tensor.normal_()
        for layer in getattr(cache, "layers", ()):
            if isinstance(getattr(layer, "cumulative_length", None), Tensor):
                layer.cumulative_length.fill_(length)
        return cache

    def sequence_bytes(self, cache: Any, batch: int) -> int:
        """Keys and values of one row."""
        return sum(t.nbytes for t in cache_tensors(cache)) // batch

    def step(self, cache: Any, batch: int, length: int, capacity: int, graph: bool) -> LlamaStep:
        """What makes one token a call behind ``length`` tokens in ``cache``; ``graph``: captured as a CUDA graph."""
        step = LlamaStep(self, cache, batch, length, capacity)
        if graph:
            step.capture()
        return step


class LlamaStep:
    """One token of every row: eagerly, or captured as a CUDA graph. Capture holds the layers, as Hymba's does; the
    output layer follows outside of it in both models."""

    def __init__(self, runner: LlamaRunner, cache: Any, batch: int, length: int, capacity: int) -> None:
        device = runner.model.device
        self.runner, self.cache = runner, cache
        self.graph: torch.cuda.CUDAGraph | None = None
        self.out: Tensor | None = None
        self.token = torch.full((batch, 1), 5, device=device)
        self.position = torch.full((1, 1), length, device=device)
        self.slots = torch.arange(capacity, device=device)

    def hidden_states(self) -> Tensor:
        """[B, 1, D]; the cache and the position move on by one."""
        # A ready mask of four axes is taken as it is by every version, so none is made on the host.
        mask = (self.slots <= self.position)[None, None]
        place = {"cache_position": self.position[0]} if self.runner.takes_position else {}
        hidden = self.runner.model.model(
            input_ids=self.token, attention_mask=mask, position_ids=self.position, past_key_values=self.cache,
            use_cache=True, **place,
        ).last_hidden_state  # fmt: skip
        self.position += 1
        return hidden

    def capture(self) -> None:
        """Three steps, then the capture; a replay is one step more. The cache must have room for all of them."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(CAPTURE_STEPS - 1):
                self.hidden_states()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = self.hidden_states()

    def __call__(self, token: Tensor) -> Tensor:
        """Next tokens [B, 1] by the highest logit."""
        self.token.copy_(token)
        if self.graph is None or self.out is None:
            hidden = self.hidden_states()
        else:
            self.graph.replay()
            hidden = self.out
        return self.runner.model.lm_head(hidden).argmax(-1)


def cache_tensors(cache: Any) -> list[Tensor]:
    """Keys and values of a static cache, as transformers keeps them in this version."""
    if hasattr(cache, "layers"):
        return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return [*cache.key_cache, *cache.value_cache]
