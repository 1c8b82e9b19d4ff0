"""Measure the data path and write benchmarks/data.md. Takes about four minutes on an idle machine.

python -m benchmarks.data.run [--quick] [--corpus DIR] [--output FILE]

``--corpus`` holds books.jsonl, speeches.jsonl, docs.jsonl and code.jsonl; without it the bundled ones are taken.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

from benchmarks.data.index_speed import build_times
from benchmarks.data.tokenize_speed import BACKENDS, speeds
from benchmarks.data.worker_speed import scaling
from data_prep.demo import CORPUS, DOMAINS
from hymba_train.bench.loader import BATCH_TOKENS, rates, table

ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE = 32_000
LARGE, LARGE_MB = "large", 24
SECTIONS = {
    "tokenising": "Tokenising: MB of text a CPU second, one core",
    "workers": "Two workers against one",
    "loader": "Loader",
    "index": "Packing index",
}
"""Word for --only -> title."""
IDLE_LOAD = 0.5
"""Load average up to which the machine counts as idle when a run begins; the parts of the run raise it themselves."""
GOALS = {"tokenizers": 2.0, "gigatoken": 6.0}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the data path.")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, a tenth of the documents")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=list(SECTIONS), help="parts to measure; the "
                        "others stay as they are in the output")  # fmt: skip
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "data.md")
    parser.add_argument("--step-ms", type=float, default=100.0, help="length of the training step that is simulated")
    args = parser.parse_args()
    domains = {domain: args.corpus / f"{domain}.jsonl" for domain in DOMAINS}
    kept = _sections(args.output) if set(args.only) != set(SECTIONS) else {}
    sections = []
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = _tokenizer(Path(scratch) / "tokenizer", domains)
        for name, title in SECTIONS.items():
            if name not in args.only:
                sections.append(kept[title])
                continue
            say(title)
            lines = _measure(name, args, domains, tokenizer, Path(scratch))
            sections.append("\n".join([f"## {title}", "", _state(load_before, args), "", *lines]) + "\n")
    text = "\n".join(["\n".join(_head(args)) + "\n", *sections])
    args.output.write_text(text, encoding="utf-8")
    print(text)


def _measure(
    name: str, args: argparse.Namespace, domains: dict[str, Path], tokenizer: Path, scratch: Path
) -> list[str]:
    """Lines of one section."""
    quick = args.quick
    if name == "tokenising":
        large = _installed_sources(scratch / "large.jsonl", (6 if quick else LARGE_MB) * 10**6)
        small = {domain: (path, 1 if quick else 5) for domain, path in domains.items()}
        return _tokenize_table(speeds({**small, LARGE: (large, 1 if quick else 3)}, tokenizer))
    if name == "workers":
        return _worker_table(scaling(domains, tokenizer, 4 if quick else 40, 1 if quick else 3))
    if name == "loader":
        return _loader_table(rates(scratch, 20_000 if quick else 200_000, args.step_ms / 1e3))
    return _index_table(build_times(scratch, 10**6 if quick else 10**7))


def _sections(path: Path) -> dict[str, str]:
    """Title -> text of the sections of an earlier result."""
    parts = path.read_text(encoding="utf-8").split("\n## ")[1:]
    return {part.partition("\n")[0]: f"## {part.rstrip()}\n" for part in parts}


def say(text: str) -> None:
    print(text, file=sys.stderr)


def _tokenizer(directory: Path, domains: dict[str, Path]) -> Path:
    """A Llama-form tokenizer of 32,000 pieces, trained on the text itself."""
    from data_prep.train_tokenizer import train_tokenizer

    train_tokenizer(list(domains.values()), directory, VOCAB_SIZE)
    return directory


def _installed_sources(path: Path, num_bytes: int) -> Path:
    """The Python sources of the packages installed here: real text, none of it twice, more than a cache holds."""
    with open(path, "w", encoding="utf-8") as stream:
        for source in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
            text = source.read_text("utf-8", "replace")
            if 600 < len(text) < 200_000:
                stream.write(json.dumps({"text": text}) + "\n")
            if stream.tell() > num_bytes:
                break
    return path


def _head(args: argparse.Namespace) -> list[str]:
    cpu = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2] for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].strip() if names else cpu
    names = ("tokenizers", "sentencepiece", "gigatoken", "orjson", "numpy")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    return [
        "# Speed of the data path", "",
        "Written by `python -m benchmarks.data.run`; run it again on your own machine.", "",
        f"- {cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}",
        f"- text: {'the bundled corpus' if args.corpus == CORPUS else 'another corpus'} "
        f"({sum((args.corpus / f'{d}.jsonl').stat().st_size for d in DOMAINS) / 1e6:.1f} MB), tokenizer of "
        f"{VOCAB_SIZE:,} pieces in Llama's form, trained on it",
        '- "a CPU second" counts the time this process had a core (all its threads together), whatever else ran',
    ]  # fmt: skip


def _state(load_before: float, args: argparse.Namespace) -> str:
    """When, and how busy the machine was."""
    state = f"idle (load average {load_before:.1f} when the run began)" if load_before <= IDLE_LOAD else (
        f"shared with other work (load average {load_before:.1f} when the run began): clock times are too long, and "
        "CPU times too, since caches are shared"
    )  # fmt: skip
    return f"Measured {datetime.date.today().isoformat()}; the machine was {state}." + (
        " A quick run: one repeat, a tenth of the documents." if args.quick else ""
    )


def _tokenize_table(table: dict) -> list[str]:
    lines = [
        "*bare*: the library's own call on texts in memory. *ours*: from the JSONL file to the published, fsynced pair "
        "with manifest: hashing, reading, parsing, encoding, checking, writing. Every figure is the median of fresh "
        "processes, so caches start cold; loading the tokenizer is in neither. The four domains are shards of 0.3 to "
        f"0.5 MB, in which publishing three files (a few ms) weighs as it does not in a real one; *{LARGE}* is "
        f"{LARGE_MB} MB of installed Python sources. Shares are medians of runs back to back.", "",
        f"| library | {' | '.join(f'{domain} bare / ours' for domain in (*DOMAINS, LARGE))} | mean of the four, ours | "
        f"ours / bare, the four | ours / bare, {LARGE} | goal |",
        "|---|" + "---:|" * (len(DOMAINS) + 5),
    ]  # fmt: skip
    for library in BACKENDS:
        cells = [f"{table[library][d]['bare']:.1f} / {table[library][d]['ours']:.1f}" for d in (*DOMAINS, LARGE)]
        mean = statistics.mean(table[library][d]["ours"] for d in DOMAINS)
        small_share = statistics.mean(table[library][d]["share"] for d in DOMAINS)
        share = table[library][LARGE]["share"]
        goal = f"{GOALS[library]:.0f} MB/s, 85 %" if library in GOALS else "85 %"
        lines.append(f"| {library} | {' | '.join(cells)} | **{mean:.1f}** | {small_share:.0%} | {share:.0%} | {goal} |")
    return [
        *lines, "",
        "Megatron-LM publishes (docs/user-guide/data-preparation.md, August 2026; Qwen3 tokenizer, number of cores not "
        "stated) 7,246 documents/s for preprocess_data.py and 61,728 for preprocess_data_fast.py, which is gigatoken. "
        "At 4 kB a document that is 29 and 247 MB/s by all cores of that machine; the figures above are of one core.",
    ]  # fmt: skip


def _worker_table(rows: dict[str, dict[str, float]]) -> list[str]:
    names = {"ours": "`hymba data tokenize`, workers", "bare": "the bare library, processes"}
    lines = [
        "Library tokenizers, whole shards, whole processes from their start (goal: 1.8x by the clock, on an idle "
        "machine with two free cores). The bare library, encoding the same copies of the same texts in one and in two "
        "processes that share nothing, shows what two cores of this machine give beside each other. The last column "
        "does not see the clock: what the CPU time of all processes would give on two cores that are free. Medians of "
        "runs back to back.", "",
        "| | MB/s, one | MB/s, two | two against one | CPU s, one | CPU s, two | 2 x CPU ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for side, name in names.items():
        row = rows[side]
        lines.append(
            f"| {name} | {row['rate1']:.2f} | {row['rate2']:.2f} | **{row['gain']:.2f}x** | {row['cpu1']:.1f} | "
            f"{row['cpu2']:.1f} | {row['cpu_gain']:.2f}x |"
        )
    return lines


def _loader_table(rows: list[dict]) -> list[str]:
    return [
        "One thread, document mask on (tokens, labels, positions, segment ids as tensors), random tokens in a file of "
        f"{rows[0]['source_mb']:,.0f} MB. A step of {rows[0]['step_ms']:.0f} ms over {BATCH_TOKENS:,} tokens stands "
        f"for the model, {BATCH_TOKENS / rows[0]['step_ms'] * 1e3:,.0f} tokens/s, more than three times what a rank "
        "of the 1.5B model is meant to reach on an H200 (47,000); two steps are prepared ahead. *Exposed*: the share "
        "of the step that it waits for its batch, when the step leaves Python alone, as one that waits for a GPU "
        "does; *in pure Python*: how much longer a step takes that never lets go of the interpreter, the worst case "
        "(goal: under 1 %; a negative value is noise).", "",
        *table(rows),
    ]  # fmt: skip


def _index_table(rows: list[dict]) -> list[str]:
    lines = [
        f"`hymba data pack` on {rows[0]['num_documents']:,} synthetic documents (log-normal lengths, mean about 1,000 "
        "tokens). Plain windows and shuffling need no index at all.", "",
        "| packing | sequence | CPU s | clock s | peak memory MB | file MB | opens in ms | sequences | full |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in rows:
        lines.append(
            f"| {row['packing']} | {row['seq_length']} | {row['cpu_seconds']:.1f} | {row['seconds']:.1f} | "
            f"{row['peak_mb']:,.0f} | {row['file_mb']:,.0f} | {row['open_ms']:.1f} | {row['num_sequences']:,} | "
            f"{row['fill']:.3%} |"
        )
    return lines


if __name__ == "__main__":
    main()
