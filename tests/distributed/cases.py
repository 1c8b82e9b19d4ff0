"""Layouts that must train as one process does, and the models that they train."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hymba_train.config import compose
from hymba_train.config.schema import Config, ModelConfig

NUM_STEPS = 10
GLOBAL_BATCH_SIZE = 4
SEQ_LENGTH = 21  # odd: no layout divides it, and rows must be padded under sequence parallelism

MODELS = {
    # hymba_tiny with shorter windows, so that 21 tokens leave them.
    "demo": dict(
        num_layers=8, hidden_size=128, ffn_hidden_size=352, num_attention_heads=4, num_query_groups=2, vocab_size=259,
        global_layers=[0, 3, 7], kv_groups=[[1, 2], [4, 5, 6]], window_size=8, num_meta_tokens=5,
        make_vocab_size_divisible_by=16,
    ),
    # The 1.5B's 25 heads in 5 groups, which no even TP divides; FFN and vocabulary do not divide either.
    "heads25": dict(
        num_layers=6, hidden_size=200, ffn_hidden_size=182, num_attention_heads=25, num_query_groups=5, vocab_size=101,
        global_layers=[0, 5], kv_groups=[[1, 2], [3, 4]], window_size=8, num_meta_tokens=5,
        make_vocab_size_divisible_by=16,
    ),
    # Layers of one branch, no meta tokens, an output layer of its own.
    "sequential": dict(
        num_layers=6, hidden_size=96, ffn_hidden_size=200, num_attention_heads=6, num_query_groups=2, vocab_size=101,
        layer_pattern=["ssm:no_ffn", "attention", "hybrid"], global_layers=[2], kv_groups=[[1, 4]], window_size=8,
        num_meta_tokens=0, untie_embeddings_and_output_weights=True, make_vocab_size_divisible_by=16,
    ),
    # Mamba-2 with one group (B and C on every rank), concatenated branches of unequal width, K/V shared across mixers.
    "mamba2_concat": dict(
        num_layers=6, hidden_size=96, ffn_hidden_size=104, num_attention_heads=6, num_query_groups=3, kv_channels=8,
        v_head_dim=12, vocab_size=101, layer_pattern=["mamba2:no_ffn", "hybrid", "attention"], branch_fusion="concat",
        global_layers=[2], kv_groups=[[1, 4]], window_size=8, num_meta_tokens=5, mamba2_head_dim=16,
        mamba2_state_dim=8, make_vocab_size_divisible_by=16,
    ),
}  # fmt: skip

WIDE = dict(
    num_layers=6, global_layers=[0, 5], kv_groups=[[1, 2], [3, 4]], window_size=128, ffn_hidden_size=1408,
    vocab_size=2001,
)  # fmt: skip
"""For GPUs: the 1.5B's hidden size, heads, SSM and meta tokens, so that its kernels and Transformer Engine run."""
WIDE_SEQ_LENGTH = 384

SHRUNK = dict(
    hidden_size=96, ffn_hidden_size=104, vocab_size=101, mamba2_head_dim=16, mamba2_state_dim=8,
    make_vocab_size_divisible_by=16,
)  # fmt: skip
"""What makes any row of the 20M comparison small enough for these tests."""


def row_model(name: str) -> ModelConfig:
    """recipes/model/ROW_20m.yaml, narrow, with 8 layers at most. ``name``: row_ROW."""
    model = compose([f"model={name.removeprefix('row_')}_20m"]).model
    heads, values = model.num_attention_heads, model.v_head_dim
    narrow = SHRUNK["hidden_size"] // heads // 2 * 2
    pattern = len(model.layer_pattern)
    layers = 8 if model.global_layers else 6 if pattern == 3 else 4
    return replace(
        model, **SHRUNK, num_layers=layers, num_meta_tokens=min(model.num_meta_tokens, 5),
        window_size=model.window_size and 8,
        kv_channels=model.kv_channels and narrow, v_head_dim=values and narrow,
    )  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """One way to run a model. ``chunks``: layers per model chunk, by model; None: an even split."""

    name: str
    world_size: int
    parallel: dict = field(default_factory=dict)
    chunks: dict[str, list[int]] | None = None
    micro_batch_size: int = 1
    document_mask: bool = False
    bucket_size: int | None = None
    """Parameters in a bucket of gradients; None: Megatron-Core's own, which holds any of these models whole."""
    attention: str = "auto"


SINGLE = Layout("single", 1)
LAYOUTS = [
    SINGLE,
    Layout("single_documents", 1, document_mask=True),
    Layout("tp2", 2, dict(tensor=2)),
    Layout("tp2_sp", 2, dict(tensor=2, sequence=True), micro_batch_size=2),
    Layout("tp2_sp_documents", 2, dict(tensor=2, sequence=True), micro_batch_size=2, document_mask=True),
    Layout("pp2", 2, dict(pipeline=2)),
    # Borders inside KV groups, one of which spans three chunks.
    Layout(
        "pp2_vpp2", 2, dict(pipeline=2, virtual_pipeline=2),
        {"demo": [2, 3, 1, 2], "heads25": [2, 1, 1, 2], "wide": [2, 1, 1, 2]},
    ),
    Layout("dp2", 2, micro_batch_size=2),
    Layout(
        "dp2_distributed_optimizer_overlap", 2,
        dict(distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True), bucket_size=30_000,
    ),
    Layout("tp4", 4, dict(tensor=4), micro_batch_size=2),
    Layout("pp4_kv_across_borders", 4, dict(pipeline=4), {"demo": [2, 3, 1, 2], "heads25": [2, 1, 1, 2]}),
    Layout("tp2_pp2", 4, dict(tensor=2, pipeline=2)),
    Layout(
        "tp2_pp2_sp", 4, dict(tensor=2, pipeline=2, sequence=True),
        {"demo": [5, 3], "heads25": [2, 4], "sequential": [2, 4], "mamba2_concat": [2, 4]},
    ),
    # Two stages have the tied embeddings, of which each data-parallel rank reduces a shard: the same on both.
    Layout(
        "pp2_dp2_recompute_distributed_optimizer", 4,
        dict(pipeline=2, recompute="full", distributed_optimizer=True, overlap_grad_reduce=True),
        {"demo": [2, 6], "heads25": [4, 2]},
    ),
    Layout("tp5_sp", 5, dict(tensor=5, sequence=True), micro_batch_size=2),
]  # fmt: skip


# The same training with every sum in another order: what rounding alone makes of it.
REORDERED = [
    Layout("single_reordered", 1, micro_batch_size=4, attention="torch"),
    Layout("single_documents_reordered", 1, micro_batch_size=4, attention="torch", document_mask=True),
]


def control_of(layout: Layout) -> str:
    """Name of the layout of one process that must train the same."""
    return "single_documents" if layout.document_mask else "single"


SEQUENTIAL_LAYOUTS = {
    "single", "single_documents", "tp2_sp_documents", "pp2", "dp2_distributed_optimizer_overlap", "tp2_pp2",
    "tp2_pp2_sp",
}  # fmt: skip


def fits(model: str, layout: Layout) -> bool:
    """Four heads cannot run on five ranks; the sequential model runs what its parts do not share with the others."""
    if model in ("sequential", "mamba2_concat"):
        return layout.name in SEQUENTIAL_LAYOUTS
    return layout.parallel.get("tensor", 1) <= MODELS[model]["num_attention_heads"]


def config_of(model: str, layout: Layout, device: str = "cpu") -> Config:
    """``wide`` is bf16, all others float32."""
    if model == "wide":
        config = Config(model=replace(compose(["model=hymba_1p5b"]).model, name=model, **WIDE))
        config.optim.lr = 3e-4
    else:
        config = Config(model=ModelConfig(name=model, **MODELS[model]) if model in MODELS else row_model(model))
        config.precision.params = "float32"
        config.optim.lr = 2e-3
        if device == "cuda":  # float32 has FlexAttention there, which is compiled anew for every shape
            config.precision.attention_backend = "torch"
    config.run.device, config.run.seed = device, 7
    if layout.attention != "auto":
        config.precision.attention_backend = layout.attention
    config.optim.weight_decay = 0.1
    # Adam divides a gradient by its own size, rounding noise included where the true gradient is nil: with a larger
    # epsilon such noise stays noise, and ten steps can be held to 1e-5.
    config.optim.adam_eps = 1e-5
    config.data.document_mask = layout.document_mask
    for key, value in layout.parallel.items():
        setattr(config.parallel, key, value)
    return config
