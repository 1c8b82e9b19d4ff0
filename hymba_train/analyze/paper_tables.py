"""Cache sizes that the paper prints, and the recipes that stand for them.

The paper prints no shapes of its 300M models; those of the recipes were inferred from these very sizes
(docs/roadmap.md), so that all rows come out shows a consistent reading of them, not the only one.
"""

from __future__ import annotations

from dataclasses import dataclass

PAPER_TOKENS = 8000


@dataclass(frozen=True)
class PaperRow:
    """``printed``: megabytes (10^6 bytes) as text, with the digits that the paper prints."""

    table: str
    name: str
    recipe: str
    printed: str


ROWS = [
    PaperRow("10, row 1", "Mamba only", "mamba_300m", "1.87"),
    PaperRow("10, row 2", "+ 4 attention heads", "parallel_4heads_300m", "99.09"),
    PaperRow("10, row 3", "+ 8 attention heads", "parallel_8heads_300m", "197.39"),
    PaperRow("10, row 4", "+ 16 attention heads", "parallel_16heads_300m", "394.00"),
    PaperRow("10, row 5", "4 + GQA", "parallel_300m", "148.24"),
    PaperRow("10, row 6", "attention only (Llama)", "transformer_300m", "414.72"),
    PaperRow("10, row 7", "5, all layers local", "all_local_300m", "5.51"),
    PaperRow("10, row 8", "5, local with 3 global layers", "local_global_300m", "41.19"),
    PaperRow("10, row 9", "8 + KV sharing", "kv_sharing_300m", "39.42"),
    PaperRow("10, row 10", "6 + the same KV compression", "transformer_kv_compressed_300m", "28.98"),
    PaperRow("10, row 11", "9, concatenated, not averaged", "concat_300m", "39.42"),
    PaperRow("10, row 12", "1 + meta tokens", "mamba_meta_300m", "1.87"),
    PaperRow("10, row 13", "9 + meta tokens", "hymba_300m", "40.01"),
    PaperRow("1, row A", "sequential hybrid", "sequential_300m", "156.3"),
    PaperRow("1, rows F, G", "Hymba-1.5B", "hymba_1p5b", "78.6"),
]
