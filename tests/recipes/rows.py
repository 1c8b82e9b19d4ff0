"""Which rows the comparisons have, in the paper's order; recipes/model/ROW_SIZE.yaml."""

ROADMAP = ("transformer", "mamba", "sequential", "parallel", "local_global", "kv_sharing", "hymba")
ABLATIONS = (
    "parallel_4heads", "parallel_8heads", "parallel_16heads", "all_local", "transformer_kv_compressed", "concat",
    "mamba_meta",
)  # fmt: skip
BASELINES = ("mamba_ffn", "mamba2", "mamba2_ffn", "samba")
ROWS = {"20m": ROADMAP + ABLATIONS + BASELINES, "300m": ROADMAP + ABLATIONS + BASELINES, "1b": ROADMAP + BASELINES}
