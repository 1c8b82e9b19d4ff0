"""Contender ``dense``: a Llama-style model of Hymba-1.5B's size in Megatron-Core + Transformer Engine.

What a lab would train on the same stack instead of a hybrid: 1.513B parameters, 30 layers of 2048, SwiGLU 6144, 32
query and 8 KV heads, Megatron-Core's own GPT model and fusions, distributed optimizer, random tokens.

python -m hymba_train.bench.dense --micro-batch 8 [--fp8 delayed|tensorwise] [--seq-length 2048] [--steps 12]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from hymba_train.bench.timing import Result, time_steps

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 30, 2048, 6144, 32, 8, 32256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--fp8", choices=("delayed", "tensorwise"))
    args = parser.parse_args()
    step, num_parameters = build(args.micro_batch, args.seq_length, args.fp8)
    ms, gib, loss = time_steps(step, 4, args.steps)
    flops = 6 * num_parameters + 6 * LAYERS * HIDDEN * args.seq_length  # causal: half of 12 L D S
    tokens = args.micro_batch * args.seq_length
    name = f"dense {'FP8 ' + args.fp8 if args.fp8 else 'BF16'}"
    Result(name, args.micro_batch, args.seq_length, ms, tokens / ms * 1e3, flops, gib, loss).report()


def build(micro_batch: int, seq_length: int, fp8: str | None):
    """(a function that makes one optimizer step and returns its loss, number of parameters)."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS,
        num_query_groups=KV_HEADS, bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16,
        normalization="RMSNorm", layernorm_epsilon=1e-6, add_bias_linear=False, gated_linear_unit=True,
        activation_func=F.silu, hidden_dropout=0.0, attention_dropout=0.0, bias_activation_fusion=True,
        bias_dropout_fusion=True, apply_rope_fusion=True, cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="te", gradient_accumulation_fusion=_weight_gradient_kernel_is_there(),
        **(dict(fp8="hybrid", fp8_recipe=fp8) if fp8 else {}),
    )  # fmt: skip
    model = GPTModel(
        config, get_gpt_layer_with_transformer_engine_spec(), VOCAB, seq_length,
        share_embeddings_and_output_weights=True, position_embedding_type="rope",
    ).cuda()  # fmt: skip
    num_parameters = sum(p.numel() for p in model.parameters())
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(config, ddp, Float16Module(config, model))
    config.finalize_model_grads_func = finalize_model_grads
    settings = OptimizerConfig(
        optimizer="adam", lr=1e-4, weight_decay=0.1, clip_grad=1.0, bf16=True, params_dtype=torch.bfloat16,
        use_distributed_optimizer=True,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(settings, [wrapped])
    config.grad_scale_func = optimizer.scale_loss
    schedule = get_forward_backward_func()
    tokens = torch.randint(3, 32000, (micro_batch, seq_length + 1), device="cuda")
    positions = torch.arange(seq_length, device="cuda")[None].expand(micro_batch, -1)

    def forward(_, chunk):
        losses = chunk(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
        return losses, lambda out: (out.float().mean(), {"loss": out.detach().float().mean()})

    def step() -> torch.Tensor:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        outputs = schedule(
            forward_step_func=forward, data_iterator=None, model=[wrapped], num_microbatches=1, seq_length=seq_length,
            micro_batch_size=micro_batch, forward_only=False,
        )  # fmt: skip
        optimizer.step()
        return outputs[0]["loss"]

    return step, num_parameters


def _weight_gradient_kernel_is_there() -> bool:
    """Megatron-Core's own linears accumulate weight gradients through this module of apex."""
    import importlib.util

    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


if __name__ == "__main__":
    main()
