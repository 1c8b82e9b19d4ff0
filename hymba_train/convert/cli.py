"""The verbs ``hymba convert`` and ``hymba generate``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hymba_train.errors import UserError
from hymba_train.parser import Parser

if TYPE_CHECKING:
    from hymba_train.convert.load import LoadedModel


def run_convert(argv: list[str]) -> int:
    """``hymba convert to-hf | from-hf``; returns the exit code."""
    parser = Parser(prog="hymba convert", description="Hugging Face format in and out")
    commands = parser.add_subparsers(dest="command", required=True, metavar="to-hf | from-hf")
    out = commands.add_parser("to-hf", help="training checkpoint -> directory for plain transformers")
    out.add_argument("--checkpoint", required=True, type=Path, metavar="RUN_OR_STEP", help="of a run: its newest step")
    out.add_argument("--output", required=True, type=Path, metavar="DIR", help="new directory")
    out.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: what the run trains in")
    out.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="most bytes in a file (default 5GB)")
    out.add_argument("--license", metavar="ID", help="licence field of the model card, e.g. apache-2.0")
    back = commands.add_parser("from-hf", help="published format -> run directory with a checkpoint to train from")
    back.add_argument("--model", required=True, type=Path, metavar="DIR", help="with config.json and safetensors")
    back.add_argument("--output", required=True, type=Path, metavar="RUN", help="new directory")
    args = parser.parse_args(argv)
    if args.command == "to-hf":
        from hymba_train.convert.to_hf import export_hf, parse_bytes

        size = parse_bytes(args.max_shard_size)
        export_hf(args.checkpoint, args.output, dtype=args.dtype, max_shard_bytes=size, license_id=args.license)
        print(f"{args.output}: load it with AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)")
    else:
        from hymba_train.convert.from_hf import RECIPE, import_hf

        import_hf(args.model, args.output)
        print(
            f"{args.output}: train from it with --config-dir {args.output / RECIPE.parts[0]} model={RECIPE.stem} "
            f"checkpoint.load={args.output} checkpoint.load_optimizer=false"
        )
    return 0


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say which model, of every verb that runs one."""
    parser.add_argument(
        "--model", "--checkpoint", required=True, type=Path, metavar="DIR", help="run, step or exported directory"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="instead of the model's own")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the weights' own")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda (default auto)")


def load_from(args: argparse.Namespace) -> LoadedModel:
    """The model that :func:`add_model_arguments`'s flags name. Raises UserError."""
    from hymba_train.convert.load import load_model, require_transformers

    require_transformers()
    return load_model(args.model, dtype=args.dtype, device=pick_device(args.device), tokenizer=args.tokenizer)


def pick_device(name: str) -> str:
    """What --device means here. Raises UserError."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda") or (name != "cpu" and not torch.cuda.is_available()):
        raise UserError(f"--device {name}: give auto, cpu or cuda; cuda needs a GPU")
    return name


def run_generate(argv: list[str]) -> int:
    """``hymba generate``; returns the exit code."""
    parser = Parser(prog="hymba generate", description="continue prompts with a model")
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line; '-' reads standard input")
    parser.add_argument("--chat", action="store_true", help="prompts are questions; answer them (instruct models)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    prompts = args.prompt if args.prompts is None else _read_prompts(args.prompts)
    loaded = load_from(args)
    from hymba_train.convert.generate import generate

    completions = generate(
        loaded, prompts, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p,
        num_beams=args.num_beams, batch_size=args.batch_size, seed=args.seed, chat=args.chat,
    )  # fmt: skip
    for prompt, completion in zip(prompts, completions, strict=True):
        line = json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False)
        between = "\n" if args.chat else ""
        print(line if args.json else f"{prompt}{between}{completion}", flush=True)
    return 0


def _read_prompts(path: Path) -> list[str]:
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: cannot be read ({error})") from error
    prompts = [line for line in text.splitlines() if line]
    if not prompts:
        raise UserError(f"--prompts {path}: holds no prompt")
    return prompts
