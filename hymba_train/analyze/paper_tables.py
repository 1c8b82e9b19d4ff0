"""Cache sizes that the paper prints, and the shapes that give them.

The shapes of the 300M models are not printed. Those below were inferred from the sizes themselves: 12 layers, hidden
1024, E = 2048, N = 16, keys 64 wide, window 256, three global layers, 16-bit values, 8,000 tokens. Values are 64 wide
in rows 2 to 4, where heads are added to Mamba, and 128 from row 5 on. The Transformer is 1080 wide; row 10 comes out
with 288 numbers of keys and as many of values a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hymba_train.config.schema import ModelConfig

PAPER_TOKENS = 8000
GLOBAL = {"global_layers": [0, 5, 11], "window_size": 256}
HYBRID = {
    "num_layers": 12, "hidden_size": 1024, "num_attention_heads": 16, "num_query_groups": 4, "kv_channels": 64,
    "v_head_dim": 128, "mamba_expand": 2, "mamba_state_dim": 16, "num_meta_tokens": 0,
}  # fmt: skip
TRANSFORMER = HYBRID | {
    "hidden_size": 1080, "num_attention_heads": 15, "num_query_groups": 15, "kv_channels": 72, "v_head_dim": 72,
    "layer_pattern": ["attention"],
}  # fmt: skip
SHARED = {"kv_groups": [[1, 2], [3, 4], [6, 7], [8, 9]]}


@dataclass(frozen=True)
class PaperRow:
    """One row of Table 10. ``settings``: fields of ModelConfig. ``remark``: why it does not come out, or ''."""

    number: int
    name: str
    megabytes: float  # as printed: MB = 10^6 bytes, two digits
    settings: dict[str, Any] = field(default_factory=dict)
    remark: str = ""

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(name=f"table_10_row_{self.number}", ffn_hidden_size=0, vocab_size=0, **self.settings)


MAMBA = (
    "12 layers as in the hybrid rows hold 0.79 MB; 1.87 comes out with 24 layers and the convolution's three inputs "
    "counted (1.868), which the hybrid rows do not count"
)
TABLE_10 = [
    PaperRow(1, "Mamba only", 1.87, HYBRID | {"layer_pattern": ["ssm"]}, MAMBA),
    PaperRow(2, "+ 4 attention heads", 99.09, HYBRID | {"num_query_groups": 4, "v_head_dim": 64}),
    PaperRow(3, "+ 8 attention heads", 197.39, HYBRID | {"num_query_groups": 8, "v_head_dim": 64}),
    PaperRow(4, "+ 16 attention heads", 394.00, HYBRID | {"num_query_groups": 16, "v_head_dim": 64}),
    PaperRow(5, "4 + GQA", 148.24, HYBRID),
    PaperRow(6, "attention only (Llama)", 414.72, TRANSFORMER),
    PaperRow(7, "5, all layers local", 5.51, HYBRID | {"window_size": 256}),
    PaperRow(8, "5, local with 3 global layers", 41.19, HYBRID | GLOBAL),
    PaperRow(9, "8 + KV sharing", 39.42, HYBRID | GLOBAL | SHARED),
    PaperRow(10, "6 + the same KV compression", 28.98, TRANSFORMER | GLOBAL | SHARED | {"num_query_groups": 4}),
    PaperRow(11, "9, concatenated instead of averaged", 39.42, HYBRID | GLOBAL | SHARED),
    PaperRow(12, "1 + meta tokens", 1.87, HYBRID | {"layer_pattern": ["ssm"], "num_meta_tokens": 128}, MAMBA),
    PaperRow(13, "9 + meta tokens", 40.01, HYBRID | GLOBAL | SHARED | {"num_meta_tokens": 128}),
]
