"""The backends of attention, a row each: what one keeps for the backward pass, where it runs, what it cannot do.

What hymba_train.ops.registry says of them as well is said without torch here, for plans made far from the GPU; tests
hold the two together (tests/describe/test_saved_activations.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hymba_train.config.schema import Config
from hymba_train.describe.dims import ModelDims
from hymba_train.describe.saved import BOOL, FLOAT32, Part, SavedTensor, Sizes

ATTENTION_BLOCK = {"cpu": 64, "cuda": 512}  # queries at a time of attention's torch backend
FLEX_HEAD_DIM = 16  # narrowest on a GPU
CUDNN_META_WIDTHS = (16, 32, 64, 128)  # tiles of tl.dot in ops/attention_meta_kernels.py, and cuDNN's own limit
INSTEAD = "set precision.attention_backend=torch"


@dataclass(frozen=True)
class AttentionBackend:
    """One row. ``check``: problems of a model's shapes, one line each."""

    saved: Part
    on_gpu_only: bool = False
    bf16_only: bool = False
    deterministic: bool = True
    check: Callable[[Config], list[str]] = lambda config: []


def check_attention(config: Config, backend: str) -> list[str]:
    """Why ``backend`` cannot compute this model's attention as the configuration wants it, one line each."""
    row, name, problems = ATTENTION.get(backend), f"precision.attention_backend={backend}", []
    if row is None:  # auto, which is chosen where the model is built
        return []
    if config.run.deterministic and not row.deterministic:
        problems.append(f"{name} is not deterministic, run.deterministic=true; {INSTEAD}")
    if config.precision.params != "bf16" and row.bf16_only:
        problems.append(f"{name} has no {config.precision.params}; {INSTEAD}, or params=bf16")
    return problems + row.check(config)


def automatic_attention(is_bf16: bool, deterministic: bool) -> str:
    """What 'auto' takes on a GPU."""
    able = (n for n, b in ATTENTION.items() if (is_bf16 or not b.bf16_only) and (b.deterministic or not deterministic))
    return next(able)


def _saved_by_torch(x: Sizes) -> Iterator[SavedTensor]:
    """Scores of a block of queries against every key that the block reaches: quadratic without a window."""
    window, block = x.description.window, ATTENTION_BLOCK["cpu" if x.setting.device == "cpu" else "cuda"]
    pairs = keys = 0
    for first in range(0, x.S, block):
        last = min(first + block, x.S)
        reached = x.M + last - (0 if window is None else max(0, first - window))
        pairs += (last - first) * reached
        keys += reached
    groups = x.H if x.heads.kv_index else len(x.heads.kv_heads)
    all_pairs, all_keys = x.B * pairs + x.M * x.M, x.B * keys + x.M
    yield SavedTensor("attention.softmax", x.H * all_pairs / x.N, FLOAT32)
    if x.is_bf16:
        yield x.kept("attention.weights", x.H * all_pairs / x.N)
    yield SavedTensor("attention.q", x.H * x.dk, FLOAT32)
    text_keys = all_keys - x.M
    if x.is_bf16 or x.heads.kv_index:
        yield SavedTensor("attention.keys", groups * x.dk * all_keys / x.N, FLOAT32)
    else:  # in float32 the meta tokens' keys are a view of where they were rotated
        yield SavedTensor("attention.keys", groups * x.dk * text_keys / x.N, FLOAT32)
        yield SavedTensor("attention.k_rotated", groups * x.dk if x.makes_kv else 0, FLOAT32)
    if not x.heads.kv_index:  # the meta tokens' values are a view of where they were projected
        if x.makes_kv and x.kv_in_projection:
            yield x.kept(*x.projected)
        elif x.makes_kv:
            yield x.kept("kv_proj.v", groups * x.dv)
    else:
        text_keys = all_keys
    yield x.kept("attention.values", groups * x.dv * text_keys / x.N)
    masks = (x.B if x.setting.documents else 1) * pairs + x.M * x.M
    yield SavedTensor("attention.mask", masks / x.N, BOOL)


def _saved_by_flex(x: Sizes) -> Iterator[SavedTensor]:
    """The kernel keeps its inputs, its output and one logarithm a query and head. K and V get the meta tokens in
    front; those of the meta tokens' own call are views of where they were made."""
    groups = x.H if x.heads.kv_index else len(x.heads.kv_heads)
    keys = x.B * (x.M + x.S) / x.N
    yield x.kept("attention.q", x.H * x.dk)
    yield x.kept("attention.keys", groups * x.dk * keys)
    yield x.kept("attention.values", groups * x.dv * keys)
    yield x.kept("attention.flex_out", x.H * x.dv)
    yield SavedTensor("attention.log_sum", x.H, FLOAT32)
    if x.makes_kv and x.M and not x.heads.kv_index:
        yield x.kept("attention.k_rotated", groups * x.dk)
        if x.kv_in_projection:
            yield x.kept(*x.projected)
        else:
            yield x.kept("kv_proj.v", groups * x.dv)


def _saved_by_cudnn(x: Sizes) -> Iterator[SavedTensor]:
    """Text and meta tokens apart, so nothing is put in front; V is copied out of where it was projected. The output is
    what comes behind it saves, unless padding heads are put behind its own."""
    groups = x.H if x.heads.kv_index else len(x.heads.kv_heads)
    yield x.kept("attention.q", x.H * x.dk)
    if x.heads.kv_index:
        yield x.kept("attention.keys", groups * x.dk)
    elif x.makes_kv:
        yield x.kept("attention.k_rotated", groups * x.dk)
    yield x.kept("attention.values", groups * x.dv)
    behind = "out_proj.in"
    if x.description.mixer == "hybrid":
        behind = "concat.attention" if x.model.branch_fusion == "concat" else "average.attention"
    yield x.kept(behind if x.H * x.dv == x.A else "attention.out", x.H * x.dv)
    yield SavedTensor("attention.log_sum", x.H, FLOAT32)


def _check_flex(config: Config) -> list[str]:
    d = ModelDims.of(config.model)
    if d.head_dim >= FLEX_HEAD_DIM:
        return []
    fewer = d.hidden_size // FLEX_HEAD_DIM
    return [
        f"model.num_attention_heads={d.num_heads}: heads of {d.head_dim} are too narrow for FlexAttention; choose "
        f"{fewer} at most, or {INSTEAD}"
    ]


def _check_cudnn(config: Config) -> list[str]:
    """A line if cuDNN's attention, or the kernels that join the meta tokens to it, cannot take heads of this width."""
    d, model = ModelDims.of(config.model), config.model

    def fits(num_heads: int) -> bool:
        widths = [model.kv_channels or d.hidden_size / num_heads, model.v_head_dim or d.inner_size / num_heads]
        if d.num_meta_tokens:
            return all(width in CUDNN_META_WIDTHS for width in widths)
        return all(width % 8 == 0 and width <= 128 for width in widths)

    if fits(d.num_heads):
        return []
    wants = "multiples of 8 up to 128"
    if d.num_meta_tokens:
        wants = f"{', '.join(map(str, CUDNN_META_WIDTHS))} with meta tokens"
    fitting = [n for n in range(d.num_kv_heads, d.hidden_size + 1, d.num_kv_heads) if fits(n)]
    near = sorted(fitting, key=lambda n: abs(n - d.num_heads))[:2]
    choose = f"choose {' or '.join(map(str, sorted(near)))} heads" if near else "no number of heads fits"
    other = "torch" if config.run.deterministic or d.head_dim < FLEX_HEAD_DIM else "flex"
    return [
        f"model.num_attention_heads={d.num_heads}: heads of {d.head_dim} with values of {d.value_head_dim}: cuDNN "
        f"takes {wants}; {choose}, or set precision.attention_backend={other}"
    ]


ATTENTION: dict[str, AttentionBackend] = {
    "cudnn": AttentionBackend(_saved_by_cudnn, on_gpu_only=True, bf16_only=True, check=_check_cudnn),
    "flex": AttentionBackend(_saved_by_flex, on_gpu_only=True, deterministic=False, check=_check_flex),
    "torch": AttentionBackend(_saved_by_torch),
}
"""In the order in which 'auto' prefers them, as in the registry."""
