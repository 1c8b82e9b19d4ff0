"""Element types and kernels against device, layer implementation and shapes.

In FP8 run the large matrix products of a layer alone: in_proj, out_proj and both of the FFN. Transformer Engine scales
tensors in blocks, and each recipe wants whole blocks along both axes of what it casts: features and rows.
"""

from __future__ import annotations

from hymba_train.config.nearest import did_you_mean, multiples_around
from hymba_train.config.schema import Config, PhaseConfig
from hymba_train.describe import LayerDescription, ModelDims, capacity, layer_tensors, resolve_stack, used_mixers
from hymba_train.describe.attention_backends import check_attention
from hymba_train.describe.backends import BACKEND_KEYS, KNOWN_BACKENDS, ON_GPU_ONLY, asked_backends, backends_of
from hymba_train.describe.mixers import SsdSizes
from hymba_train.describe.saved import MOST_STATES

BLOCK = {"delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 128}
"""precision.fp8 -> what features and rows must be multiples of (Transformer Engine's quantizers; 16: FP8 GEMMs)."""
PRODUCTS = ("mixer.in_proj.weight", "mixer.out_proj.weight", "ffn.linear_fc1.weight", "ffn.linear_fc2.weight")


def check_precision(config: Config) -> list[str]:
    """One line a problem. Expects a model and a layout that are possible by themselves."""
    precision, device = config.precision, config.run.device
    problems = []
    if precision.layer_spec == "transformer_engine" and device == "cpu":
        problems.append(
            "precision.layer_spec=transformer_engine needs a GPU, run.device is cpu; set precision.layer_spec=local"
        )
    problems += _check_backends(config)
    if precision.fp8 is None:
        return problems
    fp8 = f"precision.fp8={precision.fp8}"
    if precision.layer_spec == "local" or device == "cpu":
        key = "precision.layer_spec=local" if precision.layer_spec == "local" else "run.device=cpu"
        problems.append(f"{fp8} needs Transformer Engine, but {key}; set precision.fp8=null or change that")
    if precision.fp8 == "delayed" and config.parallel.recompute == "full":
        # Transformer Engine 2.20 leaves an FP8 region once a recomputed layer, and moves all histories on each time.
        problems.append(
            f"{fp8} with parallel.recompute=full would forget its history of amaxes a layer at a time; set "
            "precision.fp8=tensorwise, or parallel.recompute=none"
        )
    if precision.params != "bf16":
        problems.append(
            f"{fp8} needs precision.params=bf16, not {precision.params}; set that, or set precision.fp8=null"
        )
    return problems + _check_widths(config, fp8, BLOCK[precision.fp8])


def _check_backends(config: Config) -> list[str]:
    problems: dict[str, None] = {}  # a key that chooses for several ops is named once
    for op, key in BACKEND_KEYS.items():
        name = getattr(config.precision, key)
        known = ["auto", *KNOWN_BACKENDS[op]]
        if name not in known:
            problems[f"precision.{key}={name}: no such backend; {did_you_mean(name, known)}"] = None
        elif config.run.device == "cpu" and name in ON_GPU_ONLY:
            problems[f"precision.{key}={name} needs a GPU, run.device is cpu; set precision.{key}=torch"] = None
    return list(problems) or _check_kernels(config)


def _check_kernels(config: Config) -> list[str]:
    """What kernels ask of shapes and settings, where it is sure that they will run."""
    d = ModelDims.of(config.model)
    chosen = backends_of(config, "cuda") if config.run.device == "cuda" else asked_backends(config)
    problems, layers = [], resolve_stack(config.model)
    has_attention = any(layer.has_attention for layer in layers)
    scan = chosen["selective_scan"]
    if has_attention:
        problems += check_attention(config, chosen["attention"])
    heads = f"model.num_attention_heads={d.num_heads}: heads of {d.head_dim}"
    scans = [sizes for mixer in used_mixers(layers) if (sizes := mixer.ssd_sizes(config.model))]
    if chosen["ssd_scan"] == "mamba_ssm" and scans:
        problems += _check_mamba_ssm(config, scans)
    if scan == "cuda" and d.state_dim > MOST_STATES:
        problems.append(
            f"model.mamba_state_dim={d.state_dim}: the CUDA scan takes {MOST_STATES} at most; set that, or set "
            "precision.scan_backend=torch"
        )
    if scan == "triton" and d.state_dim & (d.state_dim - 1):
        below = 1 << (d.state_dim.bit_length() - 1)
        problems.append(
            f"model.mamba_state_dim={d.state_dim}: the Triton scan wants a power of two: nearest are {below} and "
            f"{2 * below}; or set precision.scan_backend=torch"
        )
    if has_attention and chosen["rotate_heads"] == "triton" and d.head_dim & (d.head_dim - 1):
        problems.append(
            f"{heads}: RoPE in Triton wants a power of two; choose another, or set precision.rope_backend=torch"
        )
    return problems


def _check_mamba_ssm(config: Config, scans: list[SsdSizes]) -> list[str]:
    """What the kernels of the package mamba_ssm ask of the layers that run them."""
    instead = "or set precision.ssd_backend=torch"
    problems = []
    if config.precision.params != "bf16":
        problems.append(
            f"precision.ssd_backend=mamba_ssm has no {config.precision.params}: its matrix products would round to "
            "TF32; set precision.ssd_backend=torch, or params=bf16"
        )
    if config.run.deterministic:
        problems.append(
            "precision.ssd_backend=mamba_ssm is not deterministic, run.deterministic=true; "
            "set precision.ssd_backend=torch"
        )
    widths = [(s.head_dim_key, s.head_dim) for s in scans] + [(s.state_dim_key, s.state_dim) for s in scans]
    for key, width in widths:
        if width & (width - 1) or width < 16:
            problems.append(f"{key}={width}: the kernels of mamba_ssm want a power of two from 16; {instead}")
    return problems


def _check_widths(config: Config, fp8: str, block: int) -> list[str]:
    """Widths of every product on a rank, each named once by the key that decides it."""
    model, tp = config.model, config.parallel.tensor
    problems: dict[str, None] = {}
    for kind in dict.fromkeys(layer.kind for layer in resolve_stack(model)):
        for name, width, key in _widths(config, kind):
            if width % block:
                of_rank = f" on each of {tp} tensor-parallel ranks" if tp > 1 and name else ""
                what = f"{name} is {width} wide{of_rank}" if name else f"{key}={width} is"
                problems[
                    f"{fp8}: {what}{',' if name else ''} not a multiple of {block}: {multiples_around(width, block)}; "
                    f"change {key}, {_other_recipe(width, block)}"
                ] = None
    return list(problems)


def _widths(config: Config, layer: LayerDescription) -> list[tuple[str, int, str]]:
    """(what, width on a rank, key that decides it); what is empty where the key is the width itself."""
    model, tp = config.model, config.parallel.tensor
    tensors = {tensor.name: tensor for tensor in layer_tensors(model, layer)}
    found = [("", model.hidden_size, "model.hidden_size")]
    for name in PRODUCTS:
        if name not in tensors or name == "ffn.linear_fc1.weight":  # fc1 is twice as wide as fc2
            continue
        cut = [s for s in tensors[name].slices if not s.is_replicated(tp)]
        width = sum(capacity(s.units, tp) * s.unit_size for s in cut)
        product = name.removesuffix(".weight")
        of_heads = "model.mamba2_head_dim" if layer.mixer == "mamba2" else "model.num_attention_heads"
        heads = of_heads if tp == 1 else "parallel.tensor"
        key = "model.ffn_hidden_size" if product.startswith("ffn") else heads
        found.append((product, width, key))
    return found


def _other_recipe(width: int, block: int) -> str:
    fitting = [recipe for recipe, other in BLOCK.items() if other < block and width % other == 0]
    return f"or set precision.fp8={fitting[0]}" if fitting else "or set precision.fp8=null"


def check_fp8_rows(config: Config, key: str, phase: PhaseConfig) -> list[str]:
    """Rows of a micro-batch, which the products see as their other axis. ``key``: data.phases.NAME."""
    recipe, model = config.precision.fp8, config.model
    if recipe not in BLOCK:  # none, or one that does not exist, which is said elsewhere
        return []
    rows = model.num_meta_tokens + phase.micro_batch_size * phase.seq_length
    whole = BLOCK[recipe] * (config.parallel.tensor if config.parallel.sequence else 1)
    if rows % whole == 0:
        return []
    return [
        f"precision.fp8={recipe}: model.num_meta_tokens {model.num_meta_tokens} + {key}.micro_batch_size "
        f"{phase.micro_batch_size} x seq_length {phase.seq_length} = {rows} rows, not a multiple of {whole}: "
        f"{multiples_around(rows, whole)}"
    ]
