"""``hymba data``: offline preparation of text. Flags follow Megatron's preprocess_data where it has them."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep import inspect_data
from data_prep.bad_lines import MAX_BAD_LINES_SHOWN
from data_prep.chat import ChatSettings
from data_prep.dedup import REPORT, dedup
from data_prep.demo import DOMAINS, prepare_demo
from data_prep.duplicates import DedupSettings
from data_prep.flags import parse
from data_prep.inputs import JSONL, find_inputs
from data_prep.merge import find_prefixes, merge_sources
from data_prep.progress import Progress
from data_prep.stats import source_stats, stats_lines
from data_prep.tokenize_corpus import tokenize_files, tokenize_shards
from data_prep.tokenize_shard import Settings
from hymba_train.data.indexed import IndexedTokens
from hymba_train.data.manifest import Manifest
from hymba_train.errors import UserError
from hymba_train.exit_codes import INTERRUPTED, USER_ERROR


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns the exit code: 0, or 2 after an error of the user (printed to standard error)."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        with _terminated_like_interrupted():
            RUN[args.command](args)
    except UserError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return USER_ERROR
    except OSError as error:  # disk full, no permission: the message names the file
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted: unfinished output was removed, finished shards stay", file=sys.stderr)
        return INTERRUPTED
    return 0


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, by which a scheduler ends a job, cleans up as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_tokenize(args: argparse.Namespace) -> None:
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: at least 1")
    if (args.output_prefix is None) == (args.output_dir is None):
        raise UserError("give one of --output-prefix (all shards in one) and --output-dir (a pair a shard)")
    for key in args.json_keys:
        suffix = "" if len(args.json_keys) == 1 else f"_{key}"
        start_seconds = time.monotonic()
        if args.output_prefix is not None:
            name, before = f"{args.output_prefix}{suffix}.bin", 0
            manifests = [_tokenize_to_one(args, key, f"{args.output_prefix}{suffix}")]
        else:
            name = f"{args.output_dir}{suffix}"
            manifests, before = _tokenize_to_many(args, key, name)
        _say_tokenized(name, manifests, before, time.monotonic() - start_seconds)


def _tokenize_to_one(args: argparse.Namespace, key: str, prefix: str) -> Manifest:
    if args.part != (0, 1):
        raise UserError("--part goes with --output-dir: jobs that share the shards cannot share one output")
    return tokenize_files(
        args.input, prefix, args.tokenizer, json_key=key, append_eod=args.append_eod, num_workers=args.workers,
        max_bad_lines=args.max_bad_lines, shuffle_seed=args.shuffle_documents, overwrite=args.overwrite,
        show_progress=not args.quiet, backend=args.backend,
    )  # fmt: skip


def _tokenize_to_many(args: argparse.Namespace, key: str, output_dir: str) -> tuple[list[Manifest], int]:
    if args.shuffle_documents is not None:
        raise UserError("--shuffle-documents goes with --output-prefix, or with `hymba data merge`")
    settings = Settings(args.tokenizer, key, args.append_eod, args.backend, args.max_bad_lines)
    return tokenize_shards(
        find_inputs(args.input, args.part), output_dir, settings, num_workers=args.workers, overwrite=args.overwrite,
        show_progress=not args.quiet,
    )  # fmt: skip


def run_chat(args: argparse.Namespace) -> None:
    if args.workers < 1 or args.seq_length < 1:
        raise UserError("--workers and --seq-length: at least 1")
    if args.pairs and args.too_long == "cut":
        raise UserError("--too-long cut: pairs are left out when they are too long; leave --too-long out")
    files = find_inputs(args.input)
    if wrong := [file.path for file in files if file.format != JSONL]:
        raise UserError(f"{wrong[0]}: conversations are read from JSON lines alone; write it as .jsonl")
    chat = ChatSettings(args.pairs, args.seq_length, args.too_long)
    kind = chat.facts()["kind"]
    settings = Settings(args.tokenizer, kind, max_bad_lines=args.max_bad_lines, chat=chat)
    manifests, before = tokenize_shards(
        files, args.output_dir, settings, num_workers=args.workers, overwrite=args.overwrite,
        show_progress=not args.quiet,
    )  # fmt: skip
    for file, manifest in zip(files, manifests, strict=True):
        facts, together = manifest.chat, manifest.documents_per_piece
        print(
            f"{args.output_dir}/{file.stem}: {manifest.num_documents // together:,} {kind}, "
            f"{manifest.num_tokens:,} tokens, {facts['num_answer_tokens']:,} of them answers; "
            f"{facts['num_too_long']:,} longer than {args.seq_length} tokens and left out, {facts['num_cut']:,} cut; "
            f"{manifest.num_bad_lines:,} bad lines left out"
            + (f" (listed in {args.output_dir}/{file.stem}.bad_lines.txt)" if manifest.num_bad_lines else "")
        )
    if before:
        print(f"{before} of {len(files)} were done before")


def _say_tokenized(name: str, manifests: list[Manifest], before: int, seconds: float) -> None:
    megabytes = sum(facts["text_bytes"] for manifest in manifests for facts in manifest.inputs) / 1e6
    num_bad = sum(manifest.num_bad_lines for manifest in manifests)
    shards = f" in {len(manifests)} shards, {before} of them done before" if len(manifests) > 1 or before else ""
    print(
        f"{name}: {sum(m.num_tokens for m in manifests):,} tokens ({manifests[0].dtype}) in "
        f"{sum(m.num_documents for m in manifests):,} documents{shards}; "
        f"{sum(m.num_empty_documents for m in manifests)} empty documents and {num_bad} bad lines left out"
        + (" (listed in *.bad_lines.txt)" if num_bad else "")
        + f"; {megabytes:,.1f} MB in {seconds:.1f} s, {megabytes / max(seconds, 1e-9):.1f} MB/s"
    )


def run_train_tokenizer(args: argparse.Namespace) -> None:
    from data_prep.train_tokenizer import train_tokenizer

    bad_lines = train_tokenizer(args.input, args.output, args.vocab_size, args.json_key, args.max_bad_lines)
    for line in bad_lines[:MAX_BAD_LINES_SHOWN]:
        print(f"bad line: {line}", file=sys.stderr)
    print(
        f"{args.output}: tokenizer.json and tokenizer.model with {args.vocab_size} pieces"
        + (f"; {len(bad_lines)} bad lines left out" if bad_lines else "")
    )


def run_convert_tokenizer(args: argparse.Namespace) -> None:
    from hymba_train.data.convert_tokenizer import write_tokenizer

    if not Path(args.model).is_file():
        raise UserError(f"{args.model} does not exist")
    write_tokenizer(Path(args.model).read_bytes(), args.output, args.add_special)
    print(f"{args.output}: tokenizer.json with the ids of {args.model}")


def run_merge(args: argparse.Namespace) -> None:
    prefixes = find_prefixes(args.input)
    total = sum(os.path.getsize(f"{prefix}.bin") for prefix in prefixes)
    with Progress(total, not args.quiet) as progress:
        itemsize = IndexedTokens(prefixes[0]).dtype.itemsize

        def count(tokens: int) -> None:
            done = progress.read_bytes + tokens * itemsize
            progress.update(done, done)

        merged = merge_sources(
            prefixes, args.output_prefix, shuffle_seed=args.shuffle_documents, overwrite=args.overwrite, on_block=count
        )
    print(
        f"{args.output_prefix}.bin: {merged.num_tokens:,} tokens in {merged.num_documents:,} documents from "
        f"{len(prefixes)} sources"
    )


def run_dedup(args: argparse.Namespace) -> None:
    settings = DedupSettings(
        args.method, args.json_key, args.ngram_words, args.num_hashes, args.num_bands, args.threshold
    )
    say = (lambda line: None) if args.quiet else (lambda line: print(line, file=sys.stderr))
    report = dedup(
        find_inputs(args.input), args.output_dir, settings, num_workers=args.workers,
        max_bad_lines=args.max_bad_lines, overwrite=args.overwrite, say=say,
    )  # fmt: skip
    share = report["num_removed"] / max(1, report["num_documents"])
    print(
        f"{args.output_dir}: {report['num_documents'] - report['num_removed']:,} of {report['num_documents']:,} "
        f"documents stay, {report['num_removed']:,} ({share:.1%}) were duplicates (removed.jsonl lists them); "
        f"{len(report['bad_lines'])} bad lines were passed on"
        + (f" ({args.output_dir}/{REPORT} lists them)" if report["bad_lines"] else "")
    )


def run_stats(args: argparse.Namespace) -> None:
    found = [source_stats(prefix, args.seq_length, args.tokenizer) for prefix in find_prefixes(args.prefix)]
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(line for stats in found for line in stats_lines(stats)))


def run_validate(args: argparse.Namespace) -> None:
    for prefix in find_prefixes(args.prefix):
        print("\n".join(inspect_data.validate(prefix)))


def run_inspect(args: argparse.Namespace) -> None:
    if args.sample is not None:
        from data_prep.inspect_sample import sample_text

        print(sample_text(_config(args.what, args), args.phase, args.sample, args.ids))
        return
    if len(args.what) != 1:
        raise UserError("give one PREFIX; with --sample N, the overrides of a run instead (experiment=...)")
    (prefix,) = args.what
    if args.document is None and args.window is None:
        print("\n".join(inspect_data.summary(prefix)))
        return
    if args.tokenizer is None:
        raise UserError("--tokenizer is needed to show text")
    if args.document is not None:
        print(inspect_data.document_text(prefix, args.document, args.tokenizer))
    else:
        print(inspect_data.window_text(prefix, args.window, args.seq_length, args.tokenizer))


def run_pack(args: argparse.Namespace) -> None:
    from data_prep.pack import pack_phases

    pack_phases(_config(args.overrides, args), overwrite=args.overwrite)


def run_fetch(args: argparse.Namespace) -> None:
    import logging

    from hymba_train.data.build import build_training_data

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    config = _config(args.overrides, args)
    data = build_training_data(config.data, seed=config.run.seed, vocab_size=config.model.vocab_size)
    print("\n".join(data.describe()))


def run_recall(args: argparse.Namespace) -> None:
    from data_prep.recall import write_recall

    made, documents = write_recall(
        args.output_prefix, args.tokenizer, int(args.tokens), args.seq_length, seed=args.seed,
        num_symbols=args.num_symbols, separators=args.separators, kinds=args.kinds, overwrite=args.overwrite,
    )  # fmt: skip
    kinds = ", ".join(f"{kind} {number:,}" for kind, number in sorted(documents.items()))
    print(f"{args.output_prefix}.bin: {made.num_tokens:,} tokens in {made.num_documents:,} documents ({kinds})")


def run_prepare_demo(args: argparse.Namespace) -> None:
    made = prepare_demo(args.output)
    print(f"{args.output}: tokenizer and {', '.join(DOMAINS)} {'made' if made else 'are there already'}")


def _config(overrides: list[str], args: argparse.Namespace):
    from hymba_train.config import compose, load_frozen, to_be_given
    from hymba_train.plan.instruct import fill_in_epochs

    if args.frozen is not None and (overrides or args.config_dir):
        raise UserError("--frozen: a frozen configuration takes no overrides and no --config-dir; leave them out")
    config = load_frozen(args.frozen) if args.frozen is not None else compose(overrides, config_dir=args.config_dir)
    fill_in_epochs(config)
    # A phase of whole epochs is as long as its packings, which may not be there yet.
    known_later = {f"data.phases.{name}.tokens" for name, phase in config.data.phases.items() if phase.epochs}
    missing = [key for key in to_be_given(config) if key.startswith("data.") or key == "model.vocab_size"]
    missing = [key for key in missing if key not in known_later]
    if missing:
        raise UserError(*(f"{key}: to be given, e.g. {key}=..." for key in missing))
    return config


RUN = {
    "tokenize": run_tokenize,
    "chat": run_chat,
    "train-tokenizer": run_train_tokenizer,
    "convert-tokenizer": run_convert_tokenizer,
    "merge": run_merge,
    "dedup": run_dedup,
    "stats": run_stats,
    "validate": run_validate,
    "inspect": run_inspect,
    "pack": run_pack,
    "fetch": run_fetch,
    "recall": run_recall,
    "prepare-demo": run_prepare_demo,
}
