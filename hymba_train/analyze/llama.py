"""The opponent: a Llama-style Transformer of a Hymba's size, transformers' own code with its own static cache."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from hymba_train.errors import UserError


def llama_config(hymba: Any, num_parameters: int, queries_per_group: int) -> Any:
    """LlamaConfig as deep and as wide as ``hymba`` (HymbaConfig), with its heads and vocabulary; the FFN takes what is
    left of ``num_parameters``, to a multiple of 64 (of 8 in a small model).

    Raises UserError if the heads do not divide by ``queries_per_group``.
    """
    from transformers import LlamaConfig

    heads, width, layers = hymba.num_attention_heads, hymba.hidden_size, hymba.num_hidden_layers
    if heads % queries_per_group:
        raise UserError(f"--llama-groups {queries_per_group}: the {heads} query heads do not divide by it")
    kv_heads = heads // queries_per_group
    embeddings = hymba.vocab_size * width * (1 if hymba.tie_word_embeddings else 2)
    attention = 2 * width * (heads + kv_heads) * hymba.head_dim
    left = (num_parameters - embeddings - width) / layers - attention - 2 * width
    ffn = left / (3 * width)
    multiple = 64 if ffn > 2048 else 8
    ffn = max(1, round(ffn / multiple)) * multiple
    return LlamaConfig(
        vocab_size=hymba.vocab_size, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=hymba.head_dim,
        max_position_embeddings=hymba.max_position_embeddings, rms_norm_eps=hymba.rms_norm_eps,
        tie_word_embeddings=hymba.tie_word_embeddings, attn_implementation="sdpa",
        bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip


def make_llama(config: Any, dtype: torch.dtype, device: str) -> Any:
    """Random weights, in evaluation mode."""
    from transformers import LlamaForCausalLM

    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    return model.eval().requires_grad_(False)


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
            for _ in range(3):
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
