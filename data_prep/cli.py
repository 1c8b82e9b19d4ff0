"""``hymba data``: offline preparation of text. Flags follow Megatron's preprocess_data where it has them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data_prep import inspect_data
from data_prep.convert_tokenizer import write_tokenizer
from data_prep.demo import DOMAINS, prepare_demo
from data_prep.tokenize_corpus import tokenize_files
from data_prep.train_tokenizer import train_tokenizer
from hymba_train.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns the exit code: 0, or 2 after an error of the user (printed to standard error)."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except UserError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    except OSError as error:  # disk full, no permission: the message names the file
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: unfinished output was removed", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="hymba data", description="Prepare text for training, offline.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_tokenize(commands)

    train = commands.add_parser("train-tokenizer", help="train a BPE tokenizer on JSON lines")
    train.add_argument("--input", nargs="+", required=True, metavar="FILE", help=".jsonl or .jsonl.gz (a sample: all "
                       "of it is held in memory)")  # fmt: skip
    train.add_argument("--json-key", default="text", help="key of the text (default: text)")
    train.add_argument("--vocab-size", type=int, default=32000, help="pieces, bytes and specials included")
    train.add_argument("--output", required=True, metavar="DIR", help="gets tokenizer.json and tokenizer.model")
    train.set_defaults(run=_run_train_tokenizer)

    convert = commands.add_parser("convert-tokenizer", help="SentencePiece BPE .model to tokenizer.json, same ids")
    convert.add_argument("model", metavar="FILE.model")
    convert.add_argument("--output", required=True, metavar="DIR")
    convert.add_argument("--add-special", nargs="*", default=[], metavar="NAME", help="special tokens to append, e.g. "
                         "[PAD] (Hymba's id 32000)")  # fmt: skip
    convert.set_defaults(run=_run_convert)

    inspect = commands.add_parser("inspect", help="facts about a tokenised source, or one document or window of it")
    inspect.add_argument("prefix", metavar="PREFIX", help="path without .bin / .idx")
    inspect.add_argument("--tokenizer", metavar="PATH", help="needed to show text")
    what = inspect.add_mutually_exclusive_group()
    what.add_argument("--document", type=int, metavar="N", help="show document N (from 0)")
    what.add_argument("--window", type=int, metavar="N", help="show training window N (from 0) of --seq-length")
    inspect.add_argument("--seq-length", type=int, default=2048, help="tokens in a window (default: 2048)")
    inspect.set_defaults(run=_run_inspect)

    validate = commands.add_parser("validate", help="read all of a tokenised source and compare it with its manifest")
    validate.add_argument("prefix", nargs="+", metavar="PREFIX")
    validate.set_defaults(run=_run_validate)

    demo = commands.add_parser("prepare-demo", help="tokenizer and tokenised domains from the bundled corpus")
    demo.add_argument("--output", required=True, metavar="DIR")
    demo.set_defaults(run=_run_demo)
    return parser


def _add_tokenize(commands) -> None:
    tokenize = commands.add_parser("tokenize", help="JSON lines to .bin/.idx and a manifest")
    tokenize.add_argument("--input", nargs="+", required=True, metavar="FILE", help=".jsonl or .jsonl.gz")
    tokenize.add_argument("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx and .json")
    tokenize.add_argument("--tokenizer", required=True, metavar="PATH", help="directory or .model file")
    tokenize.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys of the text; with "
                          "several, each makes PREFIX_KEY (default: text)")  # fmt: skip
    tokenize.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all "
                          "cores this process may use)")  # fmt: skip
    tokenize.add_argument("--append-eod", action=argparse.BooleanOptionalAction, default=True,
                          help="end each document with the end-of-document token (default: yes)")  # fmt: skip
    tokenize.add_argument("--skip-bad-lines", type=int, default=0, metavar="N", help="pass over up to N bad lines, and "
                          "list them in the manifest (default: 0)")  # fmt: skip
    tokenize.add_argument("--shuffle-documents", type=int, metavar="SEED", help="write the documents in a seeded order")
    tokenize.add_argument("--overwrite", action="store_true", help="replace existing output")
    tokenize.set_defaults(run=_run_tokenize)


def _run_tokenize(args: argparse.Namespace) -> None:
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: at least 1")
    for key in args.json_keys:
        prefix = args.output_prefix if len(args.json_keys) == 1 else f"{args.output_prefix}_{key}"
        start_seconds = time.monotonic()
        manifest = tokenize_files(
            args.input,
            prefix,
            args.tokenizer,
            json_key=key,
            append_eod=args.append_eod,
            num_workers=args.workers,
            skip_bad_lines=args.skip_bad_lines,
            shuffle_seed=args.shuffle_documents,
            overwrite=args.overwrite,
            show_progress=sys.stderr.isatty(),
        )
        seconds = time.monotonic() - start_seconds
        megabytes = sum(source["text_bytes"] for source in manifest.inputs) / 1e6
        for line in manifest.bad_lines:
            print(f"skipped {line}", file=sys.stderr)
        print(
            f"{prefix}.bin: {manifest.num_tokens:,} tokens ({manifest.dtype}) in {manifest.num_documents:,} documents; "
            f"{manifest.num_empty_documents} empty documents and {len(manifest.bad_lines)} bad lines left out; "
            f"{megabytes:,.1f} MB in {seconds:.1f} s, {megabytes / seconds:.1f} MB/s"
        )


def _run_train_tokenizer(args: argparse.Namespace) -> None:
    train_tokenizer(args.input, args.output, args.vocab_size, args.json_key)
    print(f"{args.output}: tokenizer.json and tokenizer.model with {args.vocab_size} pieces")


def _run_convert(args: argparse.Namespace) -> None:
    if not Path(args.model).is_file():
        raise UserError(f"{args.model} does not exist")
    write_tokenizer(Path(args.model).read_bytes(), args.output, args.add_special)
    print(f"{args.output}: tokenizer.json with the ids of {args.model}")


def _run_inspect(args: argparse.Namespace) -> None:
    if args.document is None and args.window is None:
        print("\n".join(inspect_data.summary(args.prefix)))
        return
    if args.tokenizer is None:
        raise UserError("--tokenizer is needed to show text")
    if args.document is not None:
        print(inspect_data.document_text(args.prefix, args.document, args.tokenizer))
    else:
        print(inspect_data.window_text(args.prefix, args.window, args.seq_length, args.tokenizer))


def _run_validate(args: argparse.Namespace) -> None:
    for prefix in args.prefix:
        print("\n".join(inspect_data.validate(prefix)))


def _run_demo(args: argparse.Namespace) -> None:
    made = prepare_demo(args.output)
    print(f"{args.output}: tokenizer and {', '.join(DOMAINS)} {'made' if made else 'are there already'}")


if __name__ == "__main__":
    sys.exit(main())
