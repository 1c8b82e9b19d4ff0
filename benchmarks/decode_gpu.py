"""Generation speed of the exported Hugging Face model on one GPU: Hymba-1.5B, random bfloat16 weights.

python -m benchmarks.decode_gpu [--seconds 140]     prints a table; also $OUT/decode_gpu.json if OUT is set

For prompts of 1k and 8k tokens and batches of 1, 8 and 64: seconds of the prefill, and tokens/s of one-token steps as
generate() makes them (step, output layer, argmax), run eagerly, captured as a CUDA graph, and compiled and captured.
Prompts are prefilled for at most PREFILL_ROWS rows at once, and the cache is then copied to the whole batch: what steps
cost does not depend on what the cache holds. What would start after --seconds is left out, and said to be.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from hymba_train.hf import modeling_hymba
from hymba_train.hf.configuration_hymba import HymbaConfig
from hymba_train.hf.modeling_hymba import FLOAT32_MODULES, HymbaCache, HymbaForCausalLM

LENGTHS, BATCHES, BACKENDS = (1024, 8192), (1, 8, 64), ("eager", "graph", "compile")
PREFILL_ROWS = 8
WARM_UP_STEPS = 4
TINY = dict(
    vocab_size=101, hidden_size=64, num_hidden_layers=4, intermediate_size=96, num_attention_heads=4,
    num_key_value_heads=2, num_memory_tokens=4, global_attn_idx=[0, 3], sliding_window=8, kv_reuse_group=[[1, 2]],
)  # fmt: skip


@dataclass
class Row:
    """One measurement of steps. ``gigabytes_per_second``: weights and cache that every step must read, by its time."""

    prompt_tokens: int
    batch: int
    backend: str
    tokens_per_second: float
    milliseconds_per_step: float
    gigabytes_per_second: float
    cache_megabytes: float
    first_step_seconds: float  # with capture and compilation


@dataclass
class Prefill:
    prompt_tokens: int
    rows: int
    seconds: float
    tokens_per_second: float
    peak_memory_gigabytes: float


def make_model(device: torch.device, changes: dict) -> HymbaForCausalLM:
    torch.manual_seed(0)
    with device:
        model = HymbaForCausalLM(HymbaConfig(**changes)).to(torch.bfloat16)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in FLOAT32_MODULES:
            module.float()
    return model.eval().requires_grad_(False)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def prefilled(model, rows: int, length: int, capacity: int) -> tuple[HymbaCache, float]:
    """(cache after a random prompt, seconds)"""
    ids = torch.randint(3, model.config.vocab_size, (rows, length), device=model.device)
    cache = HymbaCache(model.config, max_length=capacity)
    synchronize()
    started = time.perf_counter()
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    synchronize()
    return cache, time.perf_counter() - started


def copied(cache: HymbaCache, batch: int) -> HymbaCache:
    """A cache of its own with the rows of ``cache``, again and again up to ``batch``."""
    rows = torch.arange(batch, device=cache.lengths.device) % len(cache.lengths)
    other = HymbaCache(cache.config, cache.capacity)
    other.seen, other.lengths = cache.seen, cache.lengths[rows].clone()
    other.kv = {i: [k[rows], v[rows], *meta] for i, (k, v, *meta) in cache.kv.items()}
    other.conv, other.ssm = ({i: t[rows] for i, t in kept.items()} for kept in (cache.conv, cache.ssm))
    return other


def cache_bytes(cache: HymbaCache) -> int:
    tensors = [t for entry in cache.kv.values() for t in entry] + [*cache.conv.values(), *cache.ssm.values()]
    return sum(t.numel() * t.element_size() for t in tensors)


def measure_steps(model, start: HymbaCache, batch: int, backend: str, length: int, steps: int) -> Row:
    model.config.decode_backend = backend
    cache = copied(start, batch)
    token = torch.full((batch, 1), 5, device=model.device)
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters()) + cache_bytes(cache)
    times = []
    for step in range(WARM_UP_STEPS + steps):
        if step in (0, 1, WARM_UP_STEPS):
            synchronize()
            times.append(time.perf_counter())
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    synchronize()
    seconds = (time.perf_counter() - times[2]) / steps
    assert backend == "eager" or model.device.type != "cuda" or cache.graph is not None
    return Row(
        length, batch, backend, batch / seconds, seconds * 1e3, num_bytes / seconds / 1e9, cache_bytes(cache) / 1e6,
        times[1] - times[0],
    )  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=140, help="start nothing after this time")
    parser.add_argument("--steps", type=int, default=40, help="steps that are timed")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on a CPU too: tries the script itself")
    args = parser.parse_args()
    started = time.perf_counter()
    if not torch.cuda.is_available() and not args.tiny:
        raise SystemExit("there is no GPU here; --tiny tries the script on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths = (40, 90) if args.tiny else LENGTHS
    model = make_model(device, TINY if args.tiny else {})
    capacity = {n: n + WARM_UP_STEPS + args.steps + 1 for n in lengths}
    prefills, rows, left_out, starts = [], [], [], {}

    def late(what: str) -> bool:
        if time.perf_counter() - started > args.seconds:
            left_out.append(what)
        return bool(left_out) and left_out[-1] == what

    for length in lengths:
        for count in (1, PREFILL_ROWS):
            prefilled(model, count, length, capacity[length])  # compiles
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            starts[length], seconds = prefilled(model, count, length, capacity[length])
            peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
            prefills.append(Prefill(length, count, seconds, count * length / seconds, peak))
            print(prefills[-1], flush=True)
    for backend in BACKENDS:  # compiled steps last: they take longest to start
        for length in lengths:
            for batch in BATCHES:
                if late(f"{backend}, {length} tokens, batch {batch}"):
                    continue
                try:
                    rows.append(measure_steps(model, starts[length], batch, backend, length, args.steps))
                    print(rows[-1], flush=True)
                except torch.OutOfMemoryError:
                    left_out.append(f"{backend}, {length} tokens, batch {batch} (out of memory)")
    facts = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__, "transformers": transformers.__version__,
        "mamba_ssm": modeling_hymba.selective_scan_fn is not None, "parameters": model.num_parameters(),
        "steps": args.steps, "left_out": left_out, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    if out := os.environ.get("OUT"):
        content = facts | {"prefill": [asdict(p) for p in prefills], "decode": [asdict(r) for r in rows]}
        Path(out, "decode_gpu.json").write_text(json.dumps(content, indent=1))
    report(facts, prefills, rows)


def report(facts: dict, prefills: list[Prefill], rows: list[Row]) -> None:
    print("\n" + ", ".join(f"{key} {value}" for key, value in facts.items() if key != "left_out") + "\n")
    print("| prompt | rows | prefill, s | tokens/s | peak memory, GB |\n|---:|---:|---:|---:|---:|")
    for p in prefills:
        numbers = f"{p.seconds:.3f} | {p.tokens_per_second:,.0f} | {p.peak_memory_gigabytes:.1f}"
        print(f"| {p.prompt_tokens:,} | {p.rows} | {numbers} |")
    print("\n| prompt | batch | steps | tokens/s | ms a step | GB/s | cache, MB | first step, s |")
    print("|---:|---:|---|---:|---:|---:|---:|---:|")
    for r in rows:
        numbers = f"{r.tokens_per_second:,.0f} | {r.milliseconds_per_step:.2f} | {r.gigabytes_per_second:,.0f}"
        print(f"| {r.prompt_tokens:,} | {r.batch} | {r.backend} | {numbers} | {r.cache_megabytes:,.0f} "
              f"| {r.first_step_seconds:.1f} |")  # fmt: skip
    for what in facts["left_out"]:
        print(f"left out: {what}")


if __name__ == "__main__":
    main()
