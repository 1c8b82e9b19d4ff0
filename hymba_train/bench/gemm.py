"""``hymba bench gemm``: the matrix products of a model's layers, each as training makes it, on one GPU.

Forward, forward + backward (both gradients; weight gradients added to float32), TFLOP/s, and what they come to for a
whole step. BF16, and with --fp8 the large ones in FP8 too, casts included. in_proj, out_proj and the FFN go through
Transformer Engine where it is installed, as they do in training; x_proj, dt_proj and the output layer through torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_train.bench.timing import milliseconds, need_gpu
from hymba_train.config import compose
from hymba_train.config.schema import ModelConfig
from hymba_train.describe import resolve_stack
from hymba_train.describe.tensors import layer_tensors
from hymba_train.errors import UserError
from hymba_train.train.metrics import device_peak

THROUGH_TE = {"in_proj", "out_proj", "linear_fc1", "linear_fc2"}
FP8_RECIPES = {"delayed": "DelayedScaling", "tensorwise": "Float8CurrentScaling"}
SETS = 3  # of inputs and weights, by turns: none is still in the cache
PER_TOKENS = 8192


@dataclass(frozen=True)
class Product:
    """y [rows, out] = x [rows, in] W^T, ``count`` times in a step."""

    name: str
    out_size: int
    in_size: int
    count: int

    def flops(self, rows: int) -> int:
        """Of the forward pass."""
        return 2 * rows * self.out_size * self.in_size


@dataclass(frozen=True)
class Row:
    """One product, measured. Milliseconds of one call."""

    product: Product
    precision: str
    rows: int
    forward_ms: float
    both_ms: float

    def tflops(self) -> float:
        """Of forward and backward pass."""
        return 3 * self.product.flops(self.rows) / self.both_ms / 1e9


def products(model: ModelConfig) -> list[Product]:
    """The products of all layers by shape, and the output layer over the padded vocabulary."""
    counts = Counter(
        (t.name.split(".")[-2], *t.shape)
        for layer in resolve_stack(model)
        for t in layer_tensors(model, layer)
        if t.name.endswith(("_proj.weight", "_fc1.weight", "_fc2.weight"))
    )
    found = [Product(*shape, number) for shape, number in counts.items()]
    multiple = model.make_vocab_size_divisible_by
    return [*found, Product("head", -(-model.vocab_size // multiple) * multiple, model.hidden_size, 1)]


def measure(product: Product, rows: int, device: torch.device, fp8: str | None) -> Row:
    """Raises what torch or Transformer Engine raise for a shape that they cannot do."""
    make = _te_linear if _goes_through_te(product, device) else _torch_linear
    sets = [(make(product, device, fp8), _random(rows, product.in_size, device)) for _ in range(SETS)]
    gradient = _random(rows, product.out_size, device).detach()

    def forward(one) -> None:
        with torch.no_grad():
            one[0](one[1])

    def both(one) -> None:
        one[0](one[1]).backward(gradient)
        one[1].grad = None

    return Row(product, fp8 or "bf16", rows, milliseconds(forward, sets), milliseconds(both, sets))


def _goes_through_te(product: Product, device: torch.device) -> bool:
    found = importlib.util.find_spec("transformer_engine") is not None
    return found and device.type == "cuda" and product.name in THROUGH_TE


def _random(rows: int, width: int, device: torch.device) -> Tensor:
    return torch.randn(rows, width, device=device, dtype=torch.bfloat16).requires_grad_()


def _torch_linear(product: Product, device: torch.device, fp8: str | None) -> Callable[[Tensor], Tensor]:
    weight = torch.nn.Parameter(_random(product.out_size, product.in_size, device).detach() * 0.02)
    main_grad = torch.zeros(weight.shape, device=device)

    def add(param: Tensor) -> None:  # as Megatron-Core's gradient buffers do
        main_grad.add_(param.grad)
        param.grad = None

    weight.register_post_accumulate_grad_hook(add)
    return lambda x: F.linear(x, weight)


def _te_linear(product: Product, device: torch.device, fp8: str | None) -> Callable[[Tensor], Tensor]:
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe

    module = te.Linear(
        product.in_size, product.out_size, bias=False, params_dtype=torch.bfloat16, device=device,
        fuse_wgrad_accumulation=True,
    )  # fmt: skip
    module.weight.main_grad = torch.zeros(module.weight.shape, device=device)
    made = None if fp8 is None else getattr(recipe, FP8_RECIPES[fp8])()

    def call(x: Tensor) -> Tensor:
        with te.fp8_autocast(enabled=made is not None, fp8_recipe=made):
            return module(x)

    return call


def table(rows: Sequence[Row], seq_rows: int, peak: float | None) -> list[str]:
    """Lines; the last one of a precision is the whole step. peak: FLOP/s of the BF16 rows' share."""
    lines = ["product       precision      out x in   a step   fwd ms  fwd+bwd ms  TFLOP/s  of peak"]
    for row in rows:
        p, of_peak = row.product, "" if peak is None else f"{row.tflops() * 1e12 / peak:8.1%}"
        lines.append(
            f"{p.name:13} {row.precision:10} {p.out_size:6} x {p.in_size:5} {p.count:7} {row.forward_ms:9.3f}"
            f" {row.both_ms:11.3f} {row.tflops():8.0f} {of_peak}"
        )
    for precision in dict.fromkeys(row.precision for row in rows):
        own = [row for row in rows if row.precision == precision]
        step = sum(row.both_ms * row.product.count for row in own)
        what = "all of them" if len(own) == len({row.product for row in rows}) else "these alone"
        per = step * PER_TOKENS / seq_rows
        lines.append(f"{precision}, {what}: {step:.1f} ms a step of {seq_rows} rows, {per:.1f} per {PER_TOKENS:,}")
    return lines


def main(argv: Sequence[str]) -> int:
    """Returns 0, or 1 if a product could not be measured. Raises UserError without a GPU, but for --device cpu."""
    parser = argparse.ArgumentParser(prog="hymba bench gemm", description=__doc__)
    parser.add_argument("--model", default="hymba_1p5b", metavar="RECIPE")
    parser.add_argument("--rows", type=int, default=8 * 2048, help="text rows of a micro-batch (default 16384)")
    parser.add_argument("--fp8", choices=FP8_RECIPES, help="measure the large products in FP8 too")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.parse_args(argv)
    if args.device == "cuda":
        need_gpu("gemm", "; --device cpu only shows that it runs")
    device = torch.device(args.device)
    model = compose([f"model={args.model}"]).model
    if args.fp8 and not any(_goes_through_te(product, device) for product in products(model)):
        raise UserError("hymba bench gemm: --fp8 needs a GPU and Transformer Engine")
    measured, failed = [], []
    for product in products(model):
        rows = args.rows + (0 if product.name == "head" else model.num_meta_tokens)
        for fp8 in (None, args.fp8) if args.fp8 else (None,):
            if fp8 and not _goes_through_te(product, device):
                continue
            try:
                measured.append(measure(product, rows, device, fp8))
            except Exception as error:  # one shape's failure must not lose the others' figures
                failed.append(f"{product.name} {fp8 or 'bf16'}: {str(error)[:300]}")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{name}  torch {torch.__version__}  {args.model}, {args.rows} text rows")
    for line in [*table(measured, args.rows, device_peak(name, "bf16").flops), *failed]:
        print(line)
    if args.output:
        args.output.write_text(json.dumps([asdict(row) for row in measured], indent=1), encoding="utf-8")
    return int(bool(failed))
