"""``hymba analyze cache``: bytes that a sequence keeps while it is generated, against its length, for all recipes.

Three columns, counted by ``hymba_train.describe.cache``: what our generator holds, what the released code holds, and
the paper's own way of counting, which is held to what it prints. Needs neither a GPU nor torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hymba_train.analyze import common, pictures
from hymba_train.analyze.paper_tables import PAPER_TOKENS, ROWS
from hymba_train.config import compose
from hymba_train.config.nearest import did_you_mean
from hymba_train.config.recipes import group_options, recipes_directory
from hymba_train.config.schema import ModelConfig
from hymba_train.describe.cache import ACCOUNTINGS, cache_bytes
from hymba_train.errors import UserError

NAMES = {"ours": "true bytes", "published": "released code", "paper": "paper's accounting"}


def main(argv: Sequence[str]) -> int:
    """``hymba analyze cache``; returns the exit code. Raises UserError."""
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
    common.make_directory(args.output)
    models = read_models(args.models, args.config_dir)
    curves = {name: curve(model, lengths) for name, model in models.items()}
    table = {name: curve(model, [args.at]) for name, model in models.items()}
    rows = paper_rows()
    results = {"lengths": lengths, "bytes": curves, "at": args.at, "bytes_at": table, "paper_rows": rows}
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
    """What the paper prints, and what its accounting gives for our recipes (MB = 10^6 bytes)."""
    rows = []
    for row in ROWS:
        model = compose([f"model={row.recipe}"]).model
        found = cache_bytes(model, PAPER_TOKENS, "paper").total_bytes / 1e6
        digits = len(row.printed.partition(".")[2])
        rows.append(
            {"table": row.table, "name": row.name, "recipe": row.recipe, "printed": float(row.printed), "found": found,
             "comes_out": f"{found:.{digits}f}" == row.printed}
        )  # fmt: skip
    return rows


def _print(at: int, table: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    cells = [[name, *(f"{found[how][0] / 1e6:,.2f}" for how in NAMES)] for name, found in table.items()]
    common.print_table(["model", *NAMES.values()], cells, f"MB a sequence of {at:,} tokens keeps (MB = 10^6 bytes)")
    cells = [
        [row["table"], row["name"], row["recipe"], f"{row['printed']:g}", f"{row['found']:.3f}",
         "=" if row["comes_out"] else f"{row['found'] - row['printed']:+.3f}"]
        for row in rows
    ]  # fmt: skip
    title = f"the paper's tables ({PAPER_TOKENS:,} tokens) and its accounting of our recipes, MB"
    common.print_table(["table", "configuration", "recipe", "printed", "found", "difference"], cells, title)


def draw(lengths: list[int], curves: dict[str, Any], path: Path) -> None:
    """A panel for the recipes of each size, by the end of their names."""
    plt = pictures.pyplot()
    sizes: dict[str, list[str]] = {}
    for name in curves:
        end = name.rpartition("_")[2]
        sizes.setdefault(end if sum(other.endswith(f"_{end}") for other in curves) > 1 else "other", []).append(name)
    figure, axes = pictures.grid(plt, len(sizes), 1, width=9.0, height=4.2)
    for (ax,), (size, names) in zip(axes, sizes.items(), strict=True):
        for number, name in enumerate(names):
            colour, style = f"C{number % 10}", ["-", "--"][number // 10 % 2]
            ax.plot(lengths, [b / 1e6 for b in curves[name]["ours"]], style, color=colour, marker=".", label=name)
            ax.plot(lengths, [b / 1e6 for b in curves[name]["paper"]], ":", color=colour, linewidth=0.8)
        ax.set(ylabel="MB a sequence", xscale="log", yscale="log", xlabel="text tokens")
        ax.set_title(f"{size}: true bytes (dotted: the paper's accounting)", fontsize=9)
        ax.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=7)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=7)
    pictures.save(figure, path, dpi=90)
