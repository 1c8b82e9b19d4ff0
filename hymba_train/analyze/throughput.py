"""``hymba analyze throughput``: prefill and decode speed and cache of a Hymba and of a Llama-style Transformer.

Both run through transformers with static caches, once with eager one-token steps and once (on a GPU) with the step
captured as a CUDA graph. A batch that does not fit is halved until it does, as in the paper.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hymba_train.analyze import common, pictures
from hymba_train.analyze.llama import llama_config, make_llama
from hymba_train.analyze.runners import HymbaRunner, LlamaRunner
from hymba_train.analyze.timing import Measured, measure, ratios
from hymba_train.convert.cli import pick_device
from hymba_train.errors import UserError

PAPER = {
    "speed": 2695.8 / 721.1,  # tokens/s at 8k, batch 128, on an A100 (Table 1: 300M, Hymba with meta tokens over Llama)
    "cache": 414.7 / 40.0,
}


def main(argv: Sequence[str]) -> int:
    """``hymba analyze throughput``; returns the exit code. Raises UserError."""
    parser = common.make_parser("throughput", "speed and cache of a Hymba beside a Llama-style Transformer of its size")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", "--checkpoint", type=Path, metavar="DIR", help="run, step or exported directory")
    which.add_argument(
        "--random", metavar="RECIPE", help="random weights of recipes/model/RECIPE.yaml, e.g. hymba_1p5b"
    )
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda (default auto)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default bfloat16")
    parser.add_argument("--lengths", default="8192", metavar="LIST", help="tokens in the cache (default 8192)")
    parser.add_argument("--batches", default="128", metavar="LIST", help="sequences, halved to fit (default 128)")
    parser.add_argument(
        "--llama-groups", default="1,5", metavar="LIST", help="a Llama for each number of query heads that share a KV "
        "head: 1 is multi-head attention, as in the paper (default 1,5; what does not divide the heads is left out)"
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=30, help="timed one-token steps (default 30)")
    parser.add_argument("--prefill-rows", type=int, default=8, help="prompts of a prefill (default 8)")
    parser.add_argument("--seconds", type=float, default=180, help="nothing is begun after this time (default 180)")
    args = parser.parse_args(argv)
    common.require_positive(args, "steps", "prefill_rows")
    lengths, batches = (common.parse_numbers(f"--{n}", getattr(args, n)) for n in ("lengths", "batches"))
    common.make_directory(args.output)
    with torch.inference_mode():
        hymba, runners, left_out = _models(args)
        found = measure(
            runners, lengths, batches, steps=args.steps, prefill_rows=args.prefill_rows, seconds=args.seconds,
            graphs=hymba.device.type == "cuda",
        )  # fmt: skip
    found.left_out += left_out
    if not found.decode:
        raise UserError(*(f"throughput: {reason}" for reason in found.left_out))
    settings = {
        "model": args.model, "random": args.random, "dtype": args.dtype, "steps": args.steps, **_machine(hymba),
        "models": {name: _facts(runner.model) for name, runner in runners.items()},
    }  # fmt: skip
    results = {
        "prefill": [asdict(row) for row in found.prefill], "decode": [asdict(row) for row in found.decode],
        "ratios": ratios(found, "hymba"), "paper": PAPER, "left_out": found.left_out,
    }  # fmt: skip
    common.write_json(args.output, "throughput", settings, results)
    report(settings, results)
    draw(found, args.output / "throughput.png")
    common.print_files(args.output, ["throughput.json", "throughput.png"])
    return 0


def _models(args: argparse.Namespace) -> tuple[Any, dict[str, Any], list[str]]:
    """(Hymba, runners by name, what was left out)."""
    from hymba_train.convert.load import load_model, require_transformers

    require_transformers()
    device, dtype = pick_device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    if args.random is not None:
        hymba = random_hymba(args.random, dtype, device)
    else:
        hymba = load_model(args.model, dtype=args.dtype, device=device).model
    runners: dict[str, Any] = {"hymba": HymbaRunner(hymba)}
    left_out = []
    for groups in common.parse_numbers("--llama-groups", args.llama_groups):
        if args.llama_groups == "1,5" and hymba.config.num_attention_heads % groups:
            left_out.append(f"Llama with {groups} query heads to a KV head: {hymba.config.num_attention_heads} heads")
            continue
        config = llama_config(hymba.config, hymba.num_parameters(), groups)
        name = "llama_mha" if groups == 1 else f"llama_gqa{groups}"
        runners[name] = LlamaRunner(make_llama(config, dtype, device))
    return hymba, runners, left_out


def random_hymba(recipe: str, dtype: torch.dtype, device: str) -> Any:
    """Random weights of a model recipe. Raises UserError for a recipe that does not exist, or whose layers the Hugging
    Face code does not have."""
    from hymba_train.config import compose
    from hymba_train.convert.hf_config import TokenIds, hf_config
    from hymba_train.convert.load import new_model
    from hymba_train.describe.published import export_obstacles

    recipe_model = compose([f"model={recipe}"]).model
    if obstacles := export_obstacles(recipe_model):
        raise UserError(*(f"--random {recipe}: {obstacle}" for obstacle in obstacles))
    return new_model(hf_config(recipe_model, "float32", TokenIds()), dtype, device)


def _machine(hymba: Any) -> dict[str, Any]:
    import transformers

    from hymba_train.hf import modeling_hymba

    on_gpu = hymba.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(hymba.device) if on_gpu else platform.machine(),
        "torch": torch.__version__, "transformers": transformers.__version__,
        "mamba_ssm": on_gpu and modeling_hymba.selective_scan_fn is not None,
    }  # fmt: skip


def _facts(model: Any) -> dict[str, Any]:
    c = model.config
    return {
        "parameters": model.num_parameters(), "layers": c.num_hidden_layers, "hidden": c.hidden_size,
        "ffn": c.intermediate_size, "heads": c.num_attention_heads, "kv_heads": c.num_key_value_heads,
    }  # fmt: skip


def report(settings: dict[str, Any], results: dict[str, Any]) -> None:
    """Print the tables."""
    for name, facts in settings["models"].items():
        print(f"{name}: " + ", ".join(f"{key} {value:,}" for key, value in facts.items()))
    rows = [
        [r["model"], f"{r['length']:,}", str(r["rows"]), f"{r['tokens_per_second']:,.0f}"] for r in results["prefill"]
    ]
    common.print_table(["prefill", "tokens", "rows", "tokens/s"], rows, f"on {settings['device']}")
    rows = [
        [r["model"], f"{r['length']:,}", r["step"], f"{r['batch']} of {r['wanted_batch']}", f"{r['milliseconds']:.2f}",
         f"{r['tokens_per_second']:,.0f}", f"{r['cache_bytes'] / 1e6:,.2f}"]
        for r in results["decode"]
    ]  # fmt: skip
    common.print_table(["decode", "tokens", "steps", "batch", "ms a step", "tokens/s", "cache MB a sequence"], rows)
    rows = [
        [r["over"], f"{r['length']:,}", r["step"], f"{r['batch']} : {r['other_batch']}", f"{r['speed']:.2f}",
         f"{r['cache']:.2f}"]
        for r in results["ratios"]
    ]  # fmt: skip
    rows.append(["paper: Table 1, 300M, A100", "8k", "", "", f"{PAPER['speed']:.2f}", f"{PAPER['cache']:.2f}"])
    columns = ["Hymba over", "tokens", "steps", "batch", "times as fast", "times less cache"]
    common.print_table(columns, rows, "each model at its fastest batch")
    for line in results["left_out"]:
        print(f"left out: {line}")


def draw(found: Measured, path: Path) -> None:
    """Speed of steps and prefill and bytes of the cache against the number of tokens."""
    plt = pictures.pyplot()
    figure, axes = pictures.grid(plt, 1, 3, width=3.8, height=3.2)
    parts: list[tuple[str, Sequence[Any], Callable[[Any], str], Callable[[Any], float], str]] = [
        ("decode", found.decode, lambda r: f"{r.model}, {r.step}", lambda r: r.tokens_per_second, "tokens/s"),
        ("prefill", found.prefill, lambda r: r.model, lambda r: r.tokens_per_second, "tokens/s"),
        ("cache of a sequence", found.decode, lambda r: r.model, lambda r: r.cache_bytes / 1e6, "MB"),
    ]
    for ax, (title, rows, label, value, unit) in zip(axes[0], parts, strict=True):
        for name in dict.fromkeys(label(row) for row in rows):
            best: dict[int, float] = {}
            for row in rows:
                if label(row) == name:
                    best[row.length] = max(best.get(row.length, 0), value(row))
            ax.plot(list(best), list(best.values()), marker="o", label=name)
        ax.set(xlabel="tokens", ylabel=unit, title=title, ylim=(0, None))
        ax.grid(alpha=0.3)
        if rows:
            ax.legend(fontsize=7, frameon=False)
    pictures.save(figure, path)
