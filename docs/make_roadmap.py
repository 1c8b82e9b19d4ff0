"""Fill in the tables of docs/roadmap.md from the recipes: python docs/make_roadmap.py"""

import re
from pathlib import Path

import yaml

from hymba_train.config import compose, recipes_directory
from hymba_train.describe import cache_bytes, model_tensors, training_flops

PAGE = Path(__file__).with_name("roadmap.md")
TITLES = {
    "transformer": "Transformer (Llama)", "mamba": "Mamba", "sequential": "A: + attention, sequential",
    "parallel": "B: + heads in parallel", "local_global": "C: + local / global", "kv_sharing": "D: + KV sharing",
    "hymba": "E: + meta tokens", "parallel_4heads": "2: Mamba + 4 heads", "parallel_8heads": "3: + 8 heads",
    "parallel_16heads": "4: + 16 heads", "all_local": "7: row B, all local",
    "transformer_kv_compressed": "10: Transformer, same KV compression", "concat": "11: row D, concatenated",
    "mamba_meta": "12: Mamba + meta tokens", "mamba_ffn": "Mamba + FFN", "mamba2": "Mamba-2",
    "mamba2_ffn": "Mamba-2 + FFN", "samba": "Samba",
}  # fmt: skip
"""Row of the paper by recipe, in the order of the tables."""
NUM_TOKENS, SEQ_LENGTH = 8000, {"20m": 512, "300m": 1024, "1b": 1024}


def page() -> str:
    """The page as it should be: its text, with the tables made anew."""

    def fill(match: re.Match) -> str:
        return f"<!-- {match[1]} -->\n\n{table(match[1])}\n\n<!-- end -->"

    return re.sub(r"<!-- (20m|300m|1b) -->.*?<!-- end -->", fill, PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def table(size: str) -> str:
    """One line a row that has a recipe of this size."""
    lines = [
        "| row | `model=` | parameters | GFLOP/token | cache, paper's way | cache, true | changes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, title in TITLES.items():
        file = recipes_directory() / "model" / f"{row}_{size}.yaml"
        if file.is_file():
            model = compose([f"model={row}_{size}"]).model
            parameters = sum(tensor.num_parameters for tensor in model_tensors(model))
            flops = training_flops(model, SEQ_LENGTH[size]) / 1e9
            paper, true = (cache_bytes(model, NUM_TOKENS, how).total_bytes / 1e6 for how in ("paper", "ours"))
            cells = [title, f"{row}_{size}", f"{parameters:,}", f"{flops:.3f}", f"{paper:.2f}", f"{true:.2f}"]
            lines.append(f"| {' | '.join(cells)} | {changes(file)} |")
    return "\n".join(lines)


def changes(file: Path) -> str:
    """'from PARENT: key value, ...' as the recipe has it; the first row derives from none."""
    own = yaml.safe_load(file.read_text(encoding="utf-8"))
    parent = own.pop("defaults", None)
    if parent is None:
        return "-"
    del own["name"]
    keys = ", ".join(f"`{key}: {'null' if value is None else value}`".replace("'", "") for key, value in own.items())
    return f"from {parent[0].rpartition('_')[0]}: {keys}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
