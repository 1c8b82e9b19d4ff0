"""Contender ``plain``: Hymba as one would write it in PyTorch: float32 weights under bf16 autocast, torch.compile a
layer, FlexAttention over [meta | text], mamba_ssm's selective scan, fused AdamW. No Megatron-Core, none of our kernels.

python -m hymba_train.bench.plain --micro-batch 4 [--seq-length 2048] [--steps 8]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hymba_train.bench.timing import Result, time_steps
from hymba_train.config import compose
from hymba_train.describe import LayerDescription, ModelDims, resolve_stack, training_flops

EPS = 1e-6


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Layer(nn.Module):
    def __init__(self, dims: ModelDims, layer: LayerDescription) -> None:
        super().__init__()
        self.dims, self.layer = dims, layer
        d = dims
        q, k, v = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim, d.num_kv_heads * d.value_head_dim
        self.widths = [q, d.inner_size, d.inner_size] if layer.kv_role == "consumer" else [
            q, k, v, d.inner_size, d.inner_size
        ]  # fmt: skip
        linear = lambda a, b: nn.Linear(a, b, bias=False)  # noqa: E731
        self.in_proj, self.out_proj = linear(d.hidden_size, sum(self.widths)), linear(d.inner_size, d.hidden_size)
        self.gate_up = linear(d.hidden_size, 2 * d.ffn_hidden_size)
        self.down = linear(d.ffn_hidden_size, d.hidden_size)
        self.x_proj = linear(d.inner_size, d.dt_rank + 2 * d.state_dim)
        self.dt_proj = linear(d.dt_rank, d.inner_size)
        self.conv_weight = nn.Parameter(torch.randn(d.inner_size, d.conv_width) * 0.3)
        self.conv_bias = nn.Parameter(torch.zeros(d.inner_size))
        states = torch.arange(1, d.state_dim + 1).float().log()
        self.A_log, self.D = nn.Parameter(states.repeat(d.inner_size, 1)), nn.Parameter(torch.ones(d.inner_size))
        self.dt_bias = nn.Parameter(torch.full((d.inner_size,), -4.6))
        for name, width in dict(
            input_norm=d.hidden_size, ffn_norm=d.hidden_size, dt_norm=d.dt_rank, B_norm=d.state_dim,
            C_norm=d.state_dim, attention_norm=d.inner_size, ssm_norm=d.inner_size,
        ).items():  # fmt: skip
            setattr(self, name, nn.Parameter(torch.ones(width)))

    def forward(self, x: Tensor, k: Tensor | None, v: Tensor | None, cos: Tensor, sin: Tensor, mask):
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        from torch.nn.attention.flex_attention import flex_attention

        d, (batch, length, _) = self.dims, x.shape
        heads = lambda t, n: t.view(batch, length, n, -1).transpose(1, 2)  # noqa: E731
        parts = self.in_proj(rms(x, self.input_norm)).split(self.widths, -1)
        q = rotate(heads(parts[0], d.num_heads), cos, sin)
        if self.layer.kv_role != "consumer":
            k, v = rotate(heads(parts[1], d.num_kv_heads), cos, sin), heads(parts[2], d.num_kv_heads)
        u, z = parts[-2], parts[-1]
        q, k, v = q.to(u.dtype), k.to(u.dtype), v.to(u.dtype)
        attention = flex_attention(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2).flatten(2)
        padded = F.pad(u, (0, 0, d.conv_width - 1, 0))
        taps = (padded[:, j : j + length] * self.conv_weight[:, j].to(u.dtype) for j in range(d.conv_width))
        u = F.silu(self.conv_bias.to(u.dtype) + sum(taps))
        dt, B, C = self.x_proj(u).split([d.dt_rank, d.state_dim, d.state_dim], -1)
        dt = self.dt_proj(rms(dt, self.dt_norm))
        B, C = rms(B, self.B_norm).to(u.dtype), rms(C, self.C_norm).to(u.dtype)
        u, dt, B, C, z = (t.transpose(1, 2) for t in (u, dt, B, C, z))
        ssm = selective_scan_fn(
            u, dt, -torch.exp(self.A_log.float()), B, C, self.D.float(), z=z, delta_bias=self.dt_bias.float(),
            delta_softplus=True,
        ).transpose(1, 2)  # fmt: skip
        x = x + self.out_proj((rms(attention, self.attention_norm) + rms(ssm, self.ssm_norm)) / 2)
        gate, up = self.gate_up(rms(x, self.ffn_norm)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up), k, v


class PlainHymba(nn.Module):
    def __init__(self, model) -> None:
        super().__init__()
        self.dims, self.stack = ModelDims.of(model), resolve_stack(model)
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.meta = nn.Parameter(torch.randn(model.num_meta_tokens, model.hidden_size) * 0.02)
        self.layers = nn.ModuleList(Layer(self.dims, layer) for layer in self.stack)
        self.final_norm = nn.Parameter(torch.ones(model.hidden_size))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor, masks: dict, cos: Tensor, sin: Tensor) -> Tensor:
        meta = self.meta.expand(tokens.shape[0], -1, -1)
        x = torch.cat((meta, self.embedding(tokens)), 1)
        kept = {}
        for layer, module in zip(self.stack, self.layers, strict=True):
            k, v = kept[layer.kv_source] if layer.kv_role == "consumer" else (None, None)
            x, k, v = module(x, k, v, cos, sin, masks[layer.window])
            kept[layer.index] = k, v
        return self.loss(x[:, self.meta.shape[0] :], labels)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(rms(x, self.final_norm), self.embedding.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def block_masks(model: PlainHymba, length: int) -> dict:
    """By window."""
    from torch.nn.attention.flex_attention import create_block_mask

    num_meta = model.meta.shape[0]

    def mask(window):
        def visible(b, h, q, k):
            return q >= k if window is None else (q >= k) & ((q - k <= window) | (k < num_meta))

        return create_block_mask(visible, None, None, length, length, device="cuda")

    return {window: mask(window) for window in {layer.window for layer in model.stack}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64
    description = compose(["experiment=bench_1p5b"]).model
    with torch.device("cuda"):
        model = PlainHymba(description)
    length = args.seq_length + description.num_meta_tokens
    masks = block_masks(model, length)
    inverse = 10000.0 ** -(torch.arange(0, model.dims.head_dim, 2, device="cuda") / model.dims.head_dim)
    angles = (torch.arange(length, device="cuda")[:, None] * inverse).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    for layer in model.layers:
        layer.compile(dynamic=False)
    model.loss = torch.compile(model.loss, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    draw = lambda: torch.randint(description.vocab_size, (args.micro_batch, args.seq_length), device="cuda")  # noqa: E731

    def step() -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(draw(), draw(), masks, cos, sin)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    ms, gib, loss = time_steps(step, 3, args.steps)
    flops = training_flops(description, args.seq_length)
    tokens = args.micro_batch * args.seq_length
    Result("plain PyTorch", args.micro_batch, args.seq_length, ms, tokens / ms * 1e3, flops, gib, loss).report()


if __name__ == "__main__":
    main()
