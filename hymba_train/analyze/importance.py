"""``hymba analyze importance``: what a model loses without the attention or the SSM branch of each layer.

A branch is removed by zeroing the weight of its norm before the mean (beta_1 or beta_2 of the paper's Eq. 3); the half
stays, so the other branch goes on at the scale it was trained at.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_train.analyze import common, pictures
from hymba_train.analyze.texts import read_texts
from hymba_train.convert.cli import add_model_arguments, load_from
from hymba_train.errors import UserError

if TYPE_CHECKING:
    from hymba_train.convert.load import LoadedModel

NORMS = {"attention": "pre_avg_layernorm1", "ssm": "pre_avg_layernorm2"}
LOSS = "loss/"  # of scores where less is better
ACCURACY_KEYS = ("acc_norm", "acc", "exact_match", "contains")  # of the harness, in this order

Score = Callable[[Any], dict[str, float]]
"""A model's scores by name. Names that begin with LOSS are losses, all others are better when higher."""


@dataclass
class Importance:
    """``base``: scores of the whole model. ``without``: (layer, branch) -> scores without that branch.
    ``left_out``: (layer, branch) -> reason."""

    base: dict[str, float]
    without: dict[tuple[int, str], dict[str, float]] = field(default_factory=dict)
    left_out: dict[tuple[int, str], str] = field(default_factory=dict)

    def change(self, layer: int, branch: str, name: str) -> float:
        """By how much the score moves when the branch is removed."""
        return self.without[layer, branch][name] - self.base[name]

    def harm(self, layer: int, branch: str, name: str) -> float:
        """The same, positive where the model got worse."""
        change = self.change(layer, branch, name)
        return change if name.startswith(LOSS) else -change


@contextmanager
def removed(mixer: Any, branch: str) -> Iterator[None]:
    """The branch adds nothing while it lasts."""
    weight = getattr(mixer, NORMS[branch]).weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.zero_()
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def importance(model: Any, score: Score, on_scored: Callable[[int, str], None] | None = None) -> Importance:
    """Scores of the model whole and without each branch in turn; the model is left as it was.

    Raises UserError if no layer has both branches: removing the only one would leave the layer without a mixer.
    """
    mixers = [layer.mamba for layer in model.model.layers]
    both = [all(hasattr(mixer, norm) for norm in NORMS.values()) for mixer in mixers]
    if not any(both):
        raise UserError(
            "importance: no layer of this model has attention and an SSM side by side; there is no branch to remove"
        )
    found = Importance(score(model))
    for layer, mixer in enumerate(mixers):
        for branch in NORMS:
            if not both[layer]:
                found.left_out[layer, branch] = "the layer has one branch alone"
                continue
            with removed(mixer, branch):
                found.without[layer, branch] = score(model)
            if on_scored is not None:
                on_scored(layer, branch)
    return found


def score_losses(texts: dict[str, list[Tensor]], batch_size: int) -> Score:
    """Mean loss (nats a token) of every domain; the first token of a sequence is not predicted."""
    groups: dict[str, list[Tensor]] = {}
    for domain, sequences in texts.items():
        groups[domain] = []
        for length in sorted({len(sequence) for sequence in sequences}):
            rows = torch.stack([sequence for sequence in sequences if len(sequence) == length])
            groups[domain] += rows.split(batch_size)

    @torch.inference_mode()
    def score(model: Any) -> dict[str, float]:
        scores = {}
        for domain, batches in groups.items():
            total = count = 0.0
            for batch in batches:
                batch = batch.to(model.device)
                logits = model(batch, use_cache=False).logits[:, :-1].flatten(0, 1)
                total += F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").item()
                count += batch[:, 1:].numel()
            scores[LOSS + domain] = total / count
        return scores

    return score


def score_tasks(loaded: LoadedModel, args: argparse.Namespace) -> Score:
    """Accuracy of lm-evaluation-harness tasks. Raises UserError without the harness."""
    from hymba_train.evaluation.harness import parse_tasks, run_tasks

    tasks = parse_tasks(args.tasks)

    def score(model: Any) -> dict[str, float]:
        found = run_tasks(loaded, tasks, batch_size=args.batch_size, limit=args.limit, include_path=args.include_path)
        return {name: _accuracy(name, values) for name, values in found.items()}

    return score


def _accuracy(name: str, values: dict[str, float]) -> float:
    for key in ACCURACY_KEYS:
        if key in values:
            return values[key]
    raise UserError(f"--tasks: {name} has no accuracy, only {', '.join(values)}; leave it out")


def score_recall(loaded: LoadedModel, args: argparse.Namespace) -> Score:
    """Accuracy of the recall tasks of recipes/evaluation/RECIPE.yaml. Raises UserError."""
    from hymba_train.config.schema import PhaseConfig
    from hymba_train.evaluation.recall_trial import recall_scores, tasks_of_recipe

    tasks, tokenizer = tasks_of_recipe(args.recall), loaded.require_tokenizer()

    def score(model: Any) -> dict[str, float]:
        found = recall_scores(model, tokenizer, tasks, PhaseConfig(), batch_size=args.batch_size)
        return {name: values["accuracy"] for name, values in found.items()}

    return score


def main(argv: Sequence[str]) -> int:
    """``hymba analyze importance``; returns the exit code. Raises UserError."""
    parser = common.make_parser("importance", "loss and task change without the attention or SSM branch of each layer")
    add_model_arguments(parser)
    common.add_text_arguments(parser, sequences=8, length=512)
    parser.add_argument("--tasks", metavar="LIST", help="lm-evaluation-harness tasks as well, e.g. piqa,hellaswag")
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="more lm-evaluation-harness task files")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents of a task")
    parser.add_argument("--recall", metavar="RECIPE", help="recall tasks of recipes/evaluation/RECIPE.yaml as well")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences in a forward pass (default 4)")
    args = parser.parse_args(argv)
    common.require_positive(args, "sequences", "length", "batch_size")
    common.make_directory(args.output)
    loaded = load_from(args)
    texts = read_texts(loaded, args)
    scores = [score_losses(texts, args.batch_size)]
    scores += [score_tasks(loaded, args)] if args.tasks else []
    scores += [score_recall(loaded, args)] if args.recall else []
    found = importance(loaded.model, lambda model: {k: v for score in scores for k, v in score(model).items()})
    settings = {
        "model": args.model, "tasks": args.tasks, "recall": args.recall, "limit": args.limit,
        "sequences": {domain: [len(sequence) for sequence in sequences] for domain, sequences in texts.items()},
    }  # fmt: skip
    common.write_json(args.output, "importance", settings, to_json(found))
    _print(found)
    draw(found, args.output / "importance.png")
    common.print_files(args.output, ["importance.json", "importance.png"])
    return 0


def to_json(found: Importance) -> dict[str, Any]:
    """What is written of the results: scores and changes by layer and branch, and means over the layers."""
    layers = [
        {"layer": layer, "branch": branch, "scores": scores,
         "change": {name: found.change(layer, branch, name) for name in found.base}}
        for (layer, branch), scores in found.without.items()
    ]  # fmt: skip
    layers_of = {branch: [layer for layer, b in found.without if b == branch] for branch in NORMS}
    means = {
        branch: {name: sum(found.change(i, branch, name) for i in whole) / len(whole) for name in found.base}
        for branch, whole in layers_of.items()
    }
    left_out = [{"layer": i, "branch": branch, "reason": reason} for (i, branch), reason in found.left_out.items()]
    return {
        "whole": found.base,
        "without": layers,
        "mean_change": means,
        "layer_0_ssm": layer_0(found),
        "left_out": left_out,
    }


def layer_0(found: Importance) -> dict[str, Any] | None:
    """The SSM branch of layer 0 among all (layer, branch): rank 1 is the most harmful to remove. None: not removed."""
    if (0, "ssm") not in found.without:
        return None
    result = {}
    for name in found.base:
        harms = [found.harm(layer, branch, name) for layer, branch in found.without]
        harm = found.harm(0, "ssm", name)
        result[name] = {
            "change": found.change(0, "ssm", name),
            "rank": 1 + sum(h > harm for h in harms),
            "of": len(harms),
        }
    return result


def _print(found: Importance) -> None:
    for branch in NORMS:
        rows = [
            [str(layer), *(f"{found.change(layer, b, name):+.4f}" for name in found.base)]
            for layer, b in found.without
            if b == branch
        ]
        rows.append(["whole model", *(f"{score:.4f}" for score in found.base.values())])
        common.print_table(["layer", *found.base], rows, f"change of each score without the {branch} branch of a layer")
    for name, values in (layer_0(found) or {}).items():
        place = f"rank {values['rank']} of {values['of']} branches"
        print(f"without the SSM branch of layer 0: {name} {values['change']:+.4f}, {place}")
    if found.left_out:
        layers = ", ".join(map(str, sorted({layer for layer, _ in found.left_out})))
        print(f"left out: layers {layers}: {next(iter(found.left_out.values()))}")


def draw(found: Importance, path: Path) -> None:
    """Change of every score without a branch, by layer."""
    plt = pictures.pyplot()
    figure, axes = pictures.grid(plt, len(found.base), 1, width=9.0, height=2.3)
    layers = sorted({layer for layer, _ in found.without})
    for (ax,), name in zip(axes, found.base, strict=True):
        for number, (branch, colour) in enumerate(pictures.BRANCHES.items()):
            places = [layer + 0.4 * number - 0.2 for layer in layers]
            ax.bar(
                places, [found.change(layer, branch, name) for layer in layers], width=0.4, color=colour, label=branch
            )
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set(ylabel="change", xticks=layers)
        ax.set_title(f"{name} (whole model: {found.base[name]:.3f})", fontsize=9)
        ax.tick_params(labelsize=7)
    axes[0][0].legend(frameon=False, title="removed", fontsize=8)
    axes[-1][0].set_xlabel("layer")
    pictures.save(figure, path)
