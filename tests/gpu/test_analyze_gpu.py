"""The opponent's step as a CUDA graph: the same tokens as eagerly."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu
pytest.importorskip("transformers", reason="transformers is not installed (extra 'hf')")


@torch.inference_mode()
def test_a_captured_step_says_what_an_eager_one_says():
    from hymba_train.analyze.llama import llama_config, make_llama
    from hymba_train.analyze.runners import LlamaRunner
    from hymba_train.hf.configuration_hymba import HymbaConfig
    from tests.hf_models import SMALL

    torch.manual_seed(0)
    config = llama_config(HymbaConfig(**SMALL), 60_000, 2)
    runner = LlamaRunner(make_llama(config, torch.float32, "cuda"))
    ids = torch.randint(0, SMALL["vocab_size"], (2, 9), device="cuda")
    token = torch.full((2, 1), 5, device="cuda")
    eager = runner.step(runner.prefill(ids, 24), 2, 9, 24, graph=False)
    for _ in range(3):  # a capture takes three steps of this token first
        eager(token)
    captured = runner.step(runner.prefill(ids, 24), 2, 9, 24, graph=True)
    assert captured.graph is not None
    for _ in range(6):
        token, found = eager(token), captured(token)
        assert torch.equal(token, found)
