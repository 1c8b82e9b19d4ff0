"""The lists of saved tensors against what autograd saves, for every backend that runs on a CPU."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hymba_train.config import compose
from hymba_train.describe import resolve_stack
from hymba_train.describe.activations import (
    PRODUCT_INPUTS,
    head_saved_tensors,
    layer_saved_tensors,
    recomputed_saved_tensors,
)
from hymba_train.describe.backends import BACKEND_KEYS, KNOWN_BACKENDS, ON_GPU_ONLY, backends_of
from hymba_train.describe.saved import Setting
from tests.children import child_environment

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 0.01  # left out of the lists: what does not grow with the rows (float32 copies of small weights)

BIG, TINY = ["model=hymba_1p5b"], ["model=hymba_tiny"]
BF16, FLOAT32 = ["precision=bf16"], ["precision=float32"]
ALONE = [*BIG, "model.num_layers=1", "model.kv_groups=[]", "model.global_layers=[]", *BF16]
MAMBA2 = [*ALONE, "model.layer_pattern=[mamba2]"]
SMALL = ["model.num_layers=2", "model.kv_groups=[]", "model.global_layers=[]"]
TINY_MAMBA2 = [*TINY, *SMALL, "model.layer_pattern=[mamba2]"]

FOUR = [*BIG, "model.num_layers=4", "model.kv_groups=[[1,2]]", "model.global_layers=[0]"]


def case(overrides, layer, seq=2048, device="meta", documents=False, batch=2):
    return dict(overrides=overrides, layer=layer, batch=batch, seq=seq, device=device, documents=documents)


CASES = {
    "global": case([*BIG, *BF16], 0),
    "producer": case([*BIG, *BF16], 1),
    "consumer": case([*BIG, *BF16], 2),
    "float32": case([*BIG, *FLOAT32], 1),
    "heads padded, K/V replicated": case([*BIG, *BF16, "parallel=tp2"], 1),
    "consumer, heads padded": case([*BIG, *BF16, "parallel=tp2"], 2),
    "heads padded, K/V replicated, evenly used": case([*BIG, *BF16, "parallel.tensor=25"], 1),
    "KV heads cut": case([*BIG, *BF16, "parallel.tensor=5"], 1),
    "sequence parallel": case([*TINY, *BF16, "parallel=tp2_sp"], 0, 480, "cpu"),
    "attention alone": case([*ALONE, "model.layer_pattern=[attention]"], 0),
    "SSM alone": case([*ALONE, "model.layer_pattern=[ssm]"], 0),
    "attention alone, narrow values": case([*ALONE, "model.layer_pattern=[attention]", "model.v_head_dim=64"], 0),
    "concat": case([*ALONE, "model.branch_fusion=concat", "model.v_head_dim=64"], 0),
    "concat, cut": case([*ALONE, "model.branch_fusion=concat", "parallel=tp2"], 0),
    "Mamba-2": case([*MAMBA2], 0),
    "Mamba-2, cut": case([*MAMBA2, "parallel.tensor=5"], 0),
    "Mamba-2, sequence parallel": case([*TINY_MAMBA2, *BF16, "parallel=tp2_sp"], 0, 480, "cpu"),
    "Mamba-2, documents, float32": case([*TINY_MAMBA2, *FLOAT32], 0, 480, "cpu", True),
    "no FFN": case([*ALONE, "model.layer_pattern=['hybrid:no_ffn']"], 0),
    "no meta tokens": case([*ALONE, "model.num_meta_tokens=0"], 0),
    "on a CPU": case([*TINY, *BF16], 0, 480, "cpu"),
    "documents": case([*TINY, *BF16], 0, 480, "cpu", True),
    "documents, float32": case([*TINY, *FLOAT32], 0, 480, "cpu", True),
    "reference scan": case([*TINY, *BF16, *SMALL, "precision.scan_backend=reference"], 0, 96, "cpu", True),
    "four layers": case([*FOUR, *BF16], "all", 512),
    "four layers, recomputed": case([*FOUR, *BF16, "parallel.recompute=full"], "all", 512),
    "four layers, recomputed, K/V replicated": case([*FOUR, *BF16, "parallel.recompute=full", "parallel=tp2"], "all"),
    "head": case([*ALONE], "head"),
    "head, cut": case([*ALONE, "parallel=tp2"], "head"),
}


@pytest.fixture(scope="module")
def measured():
    return measure(CASES)


def measure(cases):
    """Name -> (bytes, where) of every storage that is saved; in one process of its own."""
    command = [sys.executable, "-m", "tests.describe.saved_bytes", *map(json.dumps, cases.values())]
    env = child_environment(OMP_NUM_THREADS="1")
    if all(c["device"] != "cuda" for c in cases.values()):
        env["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(cases, json.loads(done.stdout.split("RESULT", 1)[1]), strict=True))


def planned(c):
    config = compose([*c["overrides"], "parallel.world_size=null"])
    backends = backends_of(config, "cuda" if c["device"] == "cuda" else "cpu")
    setting = Setting(
        c["batch"], c["seq"], config.parallel.tensor, config.parallel.sequence,
        value_bytes=2 if config.precision.params == "bf16" else 4, documents=c["documents"],
        device="cpu" if c["device"] == "cpu" else "cuda", backends=backends,
    )  # fmt: skip
    if c["layer"] == "head":
        return head_saved_tensors(config.model, setting), config
    if c["layer"] == "all":
        of_layer = recomputed_saved_tensors if config.parallel.recompute == "full" else layer_saved_tensors
        layers = [of_layer(config.model, layer, setting) for layer in resolve_stack(config.model)]
        return [t for tensors in layers for t in tensors] + head_saved_tensors(config.model, setting), config
    return layer_saved_tensors(config.model, resolve_stack(config.model)[c["layer"]], setting), config


@pytest.mark.parametrize("name", CASES)
def test_lists_hold_what_is_saved(name, measured):
    compare(CASES[name], measured[name])


def compare(c, found):
    tensors, config = planned(c)
    rows = config.model.num_meta_tokens + c["batch"] * c["seq"]
    real = sum(num_bytes for num_bytes, _ in found) / rows
    listed = sum(t.bytes_per_row for t in tensors)
    saved = "\n".join(f"{b / rows:10.1f} {where}" for b, where in sorted(found, reverse=True))
    lines = "\n".join(f"{t.bytes_per_row:10.1f} {t.name}" for t in sorted(tensors, key=lambda t: -t.bytes_per_row))
    assert listed == pytest.approx(real, rel=TOLERANCE), f"saved:\n{saved}\nlisted:\n{lines}"


def test_every_backend_of_the_models_ops_has_its_list():
    from hymba_train.model.ops import Ops
    from hymba_train.ops import BACKENDS

    ops = {field.name for field in dataclasses.fields(Ops)}
    assert ops == set(KNOWN_BACKENDS) == set(BACKEND_KEYS)
    assert {op: {b.name for b in BACKENDS[op]} for op in ops} == {op: set(b) for op, b in KNOWN_BACKENDS.items()}
    on_gpu = {b.name for op in ops for b in BACKENDS[op] if "cpu" not in b.device_types}
    assert on_gpu == set(ON_GPU_ONLY)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_is_what_the_registry_would_take(device):
    """Without looking whether packages are installed: a plan is made far from the GPU."""
    import torch

    from hymba_train.ops import BACKENDS

    config = compose(TINY)
    for is_bf16, deterministic, num_states, head_dim in itertools.product(
        (True, False), (False, True), (16, 32), (64, 72)
    ):
        needs = {"backward", "segment_ids"} | ({"deterministic"} if deterministic else set())
        dtype = torch.bfloat16 if is_bf16 else torch.float32
        config.precision.params, config.run.deterministic = "bf16" if is_bf16 else "float32", deterministic
        config.model.mamba_state_dim, config.model.kv_channels = num_states, head_dim
        chosen = backends_of(config, device)
        for op in KNOWN_BACKENDS:
            wanted = needs | ({"wide_state"} if num_states > 16 and op == "selective_scan" else set())
            if op == "rotate_heads" and head_dim == 72:
                wanted |= {"odd_width"}
            able = (b for b in BACKENDS[op] if device in b.device_types and dtype in b.dtypes and not wanted - b.can)
            assert chosen[op] == next(able).name


@pytest.mark.parametrize("layout", ["single", "tp2"])
def test_under_fp8_only_what_other_products_read_stays_in_bf16(layout):
    """With 5 KV heads on 2 ranks K/V have a product of their own, which is none of those in FP8."""
    config = compose([*BIG, *BF16, f"parallel={layout}", "parallel.world_size=null"])
    backends, tensor = backends_of(config, "cuda"), config.parallel.tensor
    plain, fp8 = (
        {t.name: t.bytes_per_row for t in layer_saved_tensors(config.model, resolve_stack(config.model)[1], setting)}
        for setting in (Setting(2, 1024, tensor, fp8=fp8, backends=backends) for fp8 in (False, True))
    )
    kept_twice = {} if layout == "single" else {"kv_proj.in": plain["input_norm.out"]}
    assert fp8 == plain | {name: plain[name] / 2 for name in PRODUCT_INPUTS} | kept_twice
