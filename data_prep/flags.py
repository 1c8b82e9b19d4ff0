"""Flags of ``hymba data``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from data_prep.duplicates import DedupSettings
from data_prep.inputs import SUFFIXES
from hymba_train.config.recall_kinds import RECALL_KINDS
from hymba_train.data.tokenizer import BACKENDS
from hymba_train.errors import UserError
from hymba_train.parser import Parser
from hymba_train.plan.recall import NUM_MARKS

FILES = f"files, directories or patterns: {', '.join(SUFFIXES)}"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parsed flags; ``command`` is the subcommand. Raises UserError."""
    parser = build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    if argv and argv[0] in commands.choices:  # argparse mixes overrides and flags only below the subcommand
        args = commands.choices[argv[0]].parse_intermixed_args(argv[1:])
        args.command = argv[0]
        return args
    return parser.parse_args(argv)


def build_parser() -> Parser:
    """Parser of all subcommands."""
    parser = Parser(prog="hymba data", description="Prepare text for training, offline.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _tokenize(commands)
    _chat(commands)
    _train_tokenizer(commands)
    _convert_tokenizer(commands)
    _merge(commands)
    _dedup(commands)
    _stats(commands)
    _validate(commands)
    _inspect(commands)
    _of_a_run(commands, "pack", "build the packings that the phases of a run ask for").add_argument(
        "--overwrite", action="store_true", help="build again what is there"
    )
    _of_a_run(commands, "fetch", "open and check the data of a run; copies remote sources into data.cache")
    _recall(commands)
    demo = commands.add_parser("prepare-demo", help="tokenizer and tokenised domains from the bundled corpus")
    demo.add_argument("--output", required=True, metavar="DIR")
    return parser


def _tokenize(commands) -> None:
    tokenize = commands.add_parser("tokenize", help="text shards to .bin/.idx and a manifest")
    add = tokenize.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help=FILES)
    add("--output-prefix", metavar="PREFIX", help="all shards in one PREFIX.bin, .idx and .json")
    add("--output-dir", metavar="DIR", help="a pair a shard; shards that are done are passed over")
    add("--tokenizer", "--tokenizer-model", required=True, metavar="PATH", help="directory or .model file")
    add("--backend", choices=BACKENDS, default="default", help="library that encodes; gigatoken is several times "
        "faster, and refused where its ids differ (default: the tokenizer's own)")  # fmt: skip
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys or columns of the text; with several, "
        "each makes an output ending in _KEY (default: text)")  # fmt: skip
    _workers(tokenize)
    add("--append-eod", action=argparse.BooleanOptionalAction, default=True,
        help="end each document with the end-of-document token (default: yes)")  # fmt: skip
    _max_bad_lines(tokenize)
    add("--shuffle-documents", type=int, metavar="SEED", help="write the documents in a seeded order")
    add("--part", type=_part, default=(0, 1), metavar="I/N", help="take every N-th shard from the I-th (from 0) on: "
        "the share of one of N jobs")  # fmt: skip
    _overwrite(tokenize)
    _quiet(tokenize)


def _chat(commands) -> None:
    chat = commands.add_parser("chat", help="conversations, or preference pairs, to sources with a loss mask")
    add = chat.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="JSON lines, as `tokenize` takes them")
    add("--output-dir", required=True, metavar="DIR", help="a source an input; those that are done are passed over")
    add("--tokenizer", required=True, metavar="PATH", help="directory or .model file")
    add("--seq-length", type=int, required=True, metavar="S", help="tokens of the sequences they are to be packed into")
    add("--pairs", action="store_true", help="records are chosen and rejected answers, for DPO")
    add("--too-long", choices=("leave_out", "cut"), default="leave_out", help="conversations beyond S: left out and "
        "counted (default), or cut at their end; pairs are always left out")  # fmt: skip
    _workers(chat)
    _max_bad_lines(chat)
    _overwrite(chat)
    _quiet(chat)


def _part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"--part {text}: write I/N with I from 0 to N - 1, e.g. 0/8")
    return int(index), int(count)


def _train_tokenizer(commands) -> None:
    train = commands.add_parser("train-tokenizer", help="train a BPE tokenizer on text shards")
    train.add_argument("--input", nargs="+", required=True, metavar="PATH", help=FILES + " (a sample: all of it is "
                       "held in memory)")  # fmt: skip
    train.add_argument("--json-key", default="text", help="key of the text (default: text)")
    train.add_argument("--vocab-size", type=int, default=32000, help="pieces, bytes and specials included")
    train.add_argument("--output", required=True, metavar="DIR", help="gets tokenizer.json and tokenizer.model")
    _max_bad_lines(train)


def _convert_tokenizer(commands) -> None:
    convert = commands.add_parser("convert-tokenizer", help="SentencePiece BPE .model to tokenizer.json, same ids")
    convert.add_argument("model", metavar="FILE.model")
    convert.add_argument("--output", required=True, metavar="DIR")
    convert.add_argument("--add-special", nargs="*", default=[], metavar="NAME", help="special tokens to append, e.g. "
                         "[PAD] (Hymba's id 32000)")  # fmt: skip


def _merge(commands) -> None:
    merge = commands.add_parser("merge", help="several tokenised sources to one")
    merge.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help="prefixes, or directories with them")
    merge.add_argument("--output-prefix", required=True, metavar="PREFIX")
    merge.add_argument("--shuffle-documents", type=int, metavar="SEED", help="write the documents in a seeded order")
    _overwrite(merge)
    _quiet(merge)


def _dedup(commands) -> None:
    default = DedupSettings()
    command = commands.add_parser("dedup", help="text shards without their duplicate documents")
    add = command.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help=FILES)
    add("--output-dir", required=True, metavar="DIR", help="gets the shards, removed.jsonl and dedup.json")
    add("--method", choices=("exact", "minhash"), default=default.method, help="equal texts, or near ones as well")
    add("--json-key", default="text", help="key or column of the text (default: text)")
    add("--ngram-words", type=int, default=default.ngram_words, help=f"words of a shingle ({default.ngram_words})")
    add("--num-hashes", type=int, default=default.num_hashes, help=f"hashes of a signature ({default.num_hashes})")
    add("--num-bands", type=int, default=default.num_bands, help=f"bands of a signature ({default.num_bands})")
    add("--threshold", type=float, default=default.threshold, help="estimated Jaccard similarity from which documents "
        f"are duplicates ({default.threshold})")  # fmt: skip
    _workers(command)
    _max_bad_lines(command)
    _overwrite(command)
    _quiet(command)


def _stats(commands) -> None:
    stats = commands.add_parser("stats", help="document lengths, bytes a token, use of the vocabulary")
    stats.add_argument("prefix", nargs="+", metavar="PREFIX", help="prefixes, or directories with them")
    stats.add_argument("--seq-length", type=int, nargs="+", default=[2048, 8192], help="count longer documents")
    stats.add_argument("--tokenizer", metavar="PATH", help="also count tokens (reads everything)")
    stats.add_argument("--json", action="store_true", help="as JSON")


def _validate(commands) -> None:
    validate = commands.add_parser("validate", help="read all of a tokenised source and compare it with its manifest")
    validate.add_argument("prefix", nargs="+", metavar="PREFIX", help="prefixes, or directories with them")


def _recall(commands) -> None:
    recall = commands.add_parser("recall", help="a source of synthetic recall tasks, to be trained on beside text")
    add = recall.add_argument
    add("--output-prefix", "--output", required=True, metavar="PREFIX", help="gets PREFIX.bin, .idx and .json")
    add("--tokenizer", "--tokenizer-model", required=True, metavar="PATH", help="directory or .model file of the run")
    add("--tokens", type=float, required=True, metavar="N", help="how many, e.g. 20e6")
    add("--seq-length", type=int, default=512, help="of the run that trains on it: documents fill it (default: 512)")
    kinds = list(RECALL_KINDS)
    add("--kinds", nargs="+", choices=kinds, default=kinds, metavar="KIND", help=f"default: {' '.join(kinds)}")
    add("--seed", type=int, default=1, help="another one gives other documents (default: 1)")
    add("--num-symbols", type=int, default=256, metavar="N", help="evaluation.recall_symbols of the run (256)")
    add("--separators", type=int, nargs=NUM_MARKS, default=[], metavar="ID", help="evaluation.recall_separators")
    _overwrite(recall)


def _inspect(commands) -> None:
    inspect = commands.add_parser(
        "inspect", help="a tokenised source, one document of it, or one sample of a run as training sees it"
    )
    add = inspect.add_argument
    add("what", nargs="*", metavar="PREFIX | OVERRIDE", help="path without .bin / .idx; with --sample, experiment=...")
    add("--tokenizer", metavar="PATH", help="needed to show text of a PREFIX")
    which = inspect.add_mutually_exclusive_group()
    which.add_argument("--document", type=int, metavar="N", help="show document N (from 0)")
    which.add_argument("--window", type=int, metavar="N", help="show window N (from 0) of --seq-length")
    which.add_argument("--sample", type=int, metavar="N", help="show global sample N (from 0) of a phase of a run")
    add("--seq-length", type=int, default=2048, help="tokens in a window (default: 2048)")
    add("--phase", metavar="NAME", help="with --sample: the phase (default: the first)")
    add("--ids", action="store_true", help="with --sample: a line a token, with its label")
    _config_files(inspect)


def _of_a_run(commands, name: str, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text)
    command.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="of the run, e.g. experiment=pretrain_1p5b")
    _config_files(command)
    return command


def _config_files(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config-dir", metavar="DIR", help="directory with more recipes")
    command.add_argument("--frozen", metavar="FILE", help="resolved.yaml of a run, instead of overrides")


def _workers(command: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0))
    command.add_argument("--workers", type=int, default=cores, help="processes (default: all cores it may use)")


def _max_bad_lines(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-bad-lines", type=_count, metavar="N", help="end the run when a shard has more than N "
                         "bad lines; 0: at the first (default: pass over and list them all)")  # fmt: skip


def _count(text: str) -> int:
    if not text.isdigit():
        raise UserError(f"--max-bad-lines {text}: give a number")
    return int(text)


def _overwrite(command: argparse.ArgumentParser) -> None:
    command.add_argument("--overwrite", action="store_true", help="replace output of other input or settings")


def _quiet(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quiet", action="store_true", help="no progress on standard error")
