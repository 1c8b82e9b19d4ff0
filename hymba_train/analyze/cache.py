"""``hymba analyze cache``: bytes that a sequence keeps while it is generated, against its length, for all recipes.

Three columns, counted by ``hymba_train.describe.cache``: what our generator holds, what the released code holds, and
the paper's own way of counting, which is held to the rows of its Table 10. Needs neither a GPU nor torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hymba_train.analyze import common, pictures
from hymba_train.analyze.paper_tables import PAPER_TOKENS, TABLE_10
from hymba_train.config import compose
from hymba_train.config.nearest import did_you_mean
from hymba_train.config.recipes import group_options, recipes_directory
from hymba_train.config.schema import ModelConfig
from hymba_train.describe.cache import ACCOUNTINGS, cache_bytes
from hymba_train.errors import UserError

NAMES = {"ours": "true bytes", "published": "released code", "paper": "paper's accounting"}
PRINTED_DIGITS = 2  # of megabytes in Table 10


def main(argv: Sequence[str]) -> int:
    parser = common.make_parser("cache", "bytes of a sequence in generation, against its length, for all recipes")
    parser.add_argument("--models", metavar="LIST", help="recipes of recipes/model (default: all)")
    parser.add_argument(
        "--config-dir", type=Path, metavar="DIR", help="directory with more recipes (DIR/model/mine.yaml)"
    )
    parser.add_argument(
        "--lengths", default="1024,2048,4096,8192,16384,32768", metavar="LIST", help="text tokens of the curves"
    )
    parser.add_argument("--at", type=int, default=PAPER_TOKENS, help=f"tokens of the table (default {PAPER_TOKENS})")
    args = parser.parse_args(argv)
    common.require_positive(args, "at")
    lengths = common.parse_numbers("--lengths", args.lengths)
    models = read_models(args.models, args.config_dir)
    common.make_directory(args.output)
    curves = {name: curve(model, lengths) for name, model in models.items()}
    table = {name: curve(model, [args.at]) for name, model in models.items()}
    rows = paper_rows()
    results = {"lengths": lengths, "bytes": curves, "at": args.at, "bytes_at": table, "table_10": rows}
    common.write_json(args.output, "cache", {"models": list(models)}, results)
    _print(args.at, table, rows)
    draw(lengths, curves, args.output / "cache.png")
    common.print_files(args.output, ["cache.json", "cache.png"])
    return 0


def read_models(names: str | None, config_dir: Path | None) -> dict[str, ModelConfig]:
    """Recipe -> model, of ``names`` or of all. Raises UserError."""
    known = group_options(recipes_directory(), *([config_dir] if config_dir else []))["model"]
    chosen = known if names is None else [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise UserError(*(f"--models {name}: {did_you_mean(name, known, 'recipes')}" for name in unknown or [""]))
    return {name: compose([f"model={name}"], config_dir=config_dir).model for name in chosen}


def curve(model: ModelConfig, lengths: Sequence[int]) -> dict[str, list[int]]:
    """Accounting -> bytes at each length."""
    return {how: [cache_bytes(model, length, how).total_bytes for length in lengths] for how in ACCOUNTINGS}


def paper_rows() -> list[dict[str, Any]]:
    """Rows of Table 10 as printed and as the paper's accounting gives them here (MB = 10^6 bytes)."""
    rows = []
    for row in TABLE_10:
        found = cache_bytes(row.model, PAPER_TOKENS, "paper").total_bytes / 1e6
        rows.append(
            {"row": row.number, "name": row.name, "printed": row.megabytes, "found": found,
             "comes_out": round(found, PRINTED_DIGITS) == row.megabytes, "remark": row.remark}
        )  # fmt: skip
    return rows


def _print(at: int, table: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    cells = [[name, *(f"{found[how][0] / 1e6:,.2f}" for how in NAMES)] for name, found in table.items()]
    common.print_table(["model", *NAMES.values()], cells, f"MB a sequence of {at:,} tokens keeps (MB = 10^6 bytes)")
    cells = [
        [str(row["row"]), row["name"], f"{row['printed']:.2f}", f"{row['found']:.2f}",
         "=" if row["comes_out"] else f"{row['found'] - row['printed']:+.2f}"]
        for row in rows
    ]  # fmt: skip
    title = f"the paper's Table 10 ({PAPER_TOKENS:,} tokens) and its accounting here, from inferred shapes"
    common.print_table(["row", "configuration", "printed", "found", "difference"], cells, title)
    for remark in dict.fromkeys(row["remark"] for row in rows if row["remark"]):
        numbers = " and ".join(str(row["row"]) for row in rows if row["remark"] == remark)
        print(f"rows {numbers}: {remark}")


def draw(lengths: list[int], curves: dict[str, Any], path: Path) -> None:
    plt = pictures.pyplot()
    figure, axes = pictures.grid(plt, 1, 1, width=7.0, height=4.6)
    ax = axes[0][0]
    for number, (name, found) in enumerate(curves.items()):
        colour, style = f"C{number % 10}", ["-", "-."][number // 10 % 2]
        ax.plot(lengths, [b / 1e6 for b in found["ours"]], style, color=colour, marker=".", label=name)
        ax.plot(lengths, [b / 1e6 for b in found["paper"]], ":", color=colour, linewidth=1)
    ax.set(xlabel="text tokens", ylabel="MB a sequence", xscale="log", yscale="log")
    ax.set_title("cache in generation: true bytes (dotted: the paper's accounting)", fontsize=10)
    ax.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=8)
    ax.grid(alpha=0.3)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    pictures.save(figure, path)
