"""The corpora that docs/data.md has recipes for: small files with their directories, names and exact record formats,
through the commands given there."""

import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.cli import main
from hymba_train.data.indexed import IndexedTokens
from hymba_train.data.tokenizer import Tokenizer


@pytest.fixture
def texts(corpus) -> list[str]:
    return [text[:2000] for text in corpus["docs"][:24]]


def documents_of(prefix) -> list[list[int]]:
    tokens = IndexedTokens(prefix)
    return [tokens.document(d).tolist() for d in range(tokens.num_documents)]


def expected(demo, texts) -> list[list[int]]:
    tokenizer = Tokenizer.load(demo / "tokenizer")
    return [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts]


def write_zst(path, records) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.compress(b"".join(json.dumps(record).encode() + b"\n" for record in records)))


def write_parquet(path, columns, **more) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **more)


def dclm_record(number: int, text: str) -> dict:
    """A line of mlfoundations/dclm-baseline-1.0."""
    return {
        "bff_contained_ngram_count_before_dedupe": number,
        "language_id_whole_page_fasttext": {"en": 0.9375},
        "metadata": {
            "Content-Length": "12345",
            "Content-Type": "application/http; msgtype=response",
            "WARC-Block-Digest": "sha1:" + "A" * 32,
            "WARC-Concurrent-To": f"<urn:uuid:11111111-0000-0000-0000-{number:012}>",
            "WARC-Date": "2014-01-01T00:00:00Z",
            "WARC-IP-Address": "198.51.100.24",
            "WARC-Identified-Payload-Type": None,
            "WARC-Payload-Digest": "sha1:" + "B" * 32,
            "WARC-Record-ID": f"<urn:uuid:00000000-0000-0000-0000-{number:012}>",
            "WARC-Target-URI": f"https://example.org/{number}",
            "WARC-Truncated": None,
            "WARC-Type": "response",
            "WARC-Warcinfo-ID": "<urn:uuid:22222222-0000-0000-0000-000000000000>",
        },
        "previous_word_count": len(text.split()),
        "text": text,
        "url": f"https://example.org/{number}",
        "warcinfo": "robots: classic\r\nhostname: example.org\r\nformat: WARC File Format 1.0\r\n",
        "fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train_prob": 0.0859375,
    }


def test_dclm_baseline(demo, tmp_path, texts, capsys):
    """Shards of one name in every local shard directory: the output keeps the directories."""
    corpus = tmp_path / "dclm-baseline-1.0"
    directories = [f"global-shard_{g:02}_of_10/local-shard_{s}_of_10" for g in (1, 2) for s in (0, 1)]
    shards = [f"{directory}/shard_00000000_processed" for directory in directories]
    for number, shard in enumerate(shards):
        records = [dclm_record(i, text) for i, text in enumerate(texts[number * 6 : number * 6 + 6])]
        write_zst(corpus / f"{shard}.jsonl.zst", records)
    (corpus / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    out = tmp_path / "out"
    tokenize = ["tokenize", "--input", str(corpus), "--output-dir", str(out), "--tokenizer", str(demo / "tokenizer")]
    for part in ("0/2", "1/2"):  # what an array of two jobs does
        assert main([*tokenize, "--backend", "gigatoken", "--part", part, "--workers", "1", "--quiet"]) == 0
    assert sorted(path.relative_to(out).with_suffix("").as_posix() for path in out.rglob("*.idx")) == shards
    assert main(["merge", "--input", str(out), "--output-prefix", str(tmp_path / "dclm"), "--quiet"]) == 0
    assert documents_of(tmp_path / "dclm") == expected(demo, texts)
    assert main(["validate", str(tmp_path / "dclm")]) == 0


def test_smollm_corpus(demo, tmp_path, texts, capsys):
    corpus = tmp_path / "smollm-corpus"
    thirds = texts[:8], texts[8:16], texts[16:]
    write_parquet(
        corpus / "cosmopedia-v2" / "train-00000-of-00104.parquet",
        {
            "prompt": ["Write an educational story (3-5 paragraphs)"] * 8, "text": thirds[0], "token_length": [500] * 8,
            "audience": ["young_children"] * 8, "format": ["educational_piece"] * 8, "seed_data": ["ultrachat"] * 8,
        },
    )  # fmt: skip
    metadata = {
        "dump": "CC-MAIN-2013-20", "url": "https://example.org", "date": datetime.datetime(2013, 5, 18, 5, 48, 59),
        "file_path": "s3://commoncrawl/crawl-data/x.warc.gz", "language": "en", "language_score": 0.97,
        "token_count": 500, "score": 2.8, "int_score": 3,
    }  # fmt: skip
    write_parquet(
        corpus / "fineweb-edu-dedup" / "train-00000-of-00234.parquet",
        {"text": thirds[1], "id": ["<urn:uuid:x>"] * 8, "metadata": [metadata] * 8}, row_group_size=3,
    )  # fmt: skip
    write_parquet(
        corpus / "python-edu" / "train-00000-of-00002.parquet",
        {"blob_id": ["a" * 40], "repo_name": ["a/b"], "path": ["/c.py"], "length_bytes": [10], "score": [4.1],
         "int_score": [4]},
    )  # fmt: skip
    flags = ["--tokenizer", str(demo / "tokenizer"), "--workers", "1", "--quiet"]
    # python-edu holds ids of files in Software Heritage, no text: the command says so instead of writing nothing.
    no_text = ["--input", str(corpus / "python-edu"), "--output-prefix", str(tmp_path / "python")]
    assert main(["tokenize", *no_text, *flags]) == 2
    assert "has no column 'text'; it has blob_id, repo_name, path, length_bytes, score" in capsys.readouterr().err
    for subset in ("cosmopedia-v2", "fineweb-edu-dedup"):
        command = ["tokenize", "--input", str(corpus / subset), "--output-dir", str(tmp_path / "out" / subset), *flags]
        assert main(command) == 0
    # After the download that its dataset card describes, python-edu is JSON lines of its own.
    write_zst(tmp_path / "python-edu" / "0.jsonl.zst", [{"blob_id": "a" * 40, "text": text} for text in thirds[2]])
    fetched = ["--input", str(tmp_path / "python-edu"), "--output-dir", str(tmp_path / "out/python-edu")]
    assert main(["tokenize", *fetched, *flags]) == 0
    merge = ["merge", "--input", str(tmp_path / "out"), "--output-prefix", str(tmp_path / "smollm"), "--quiet"]
    assert main([*merge, "--shuffle-documents", "1"]) == 0
    assert sorted(documents_of(tmp_path / "smollm")) == sorted(expected(demo, texts))


@pytest.mark.parametrize("dump", ["data/CC-MAIN-2013-20/000_00000.parquet", "sample/10BT/000_00000.parquet"])
def test_fineweb(demo, tmp_path, texts, capsys, dump):
    count = len(texts)
    write_parquet(
        tmp_path / "fineweb" / dump,
        {
            "text": texts, "id": ["<urn:uuid:x>"] * count, "dump": ["CC-MAIN-2013-20"] * count,
            "url": ["https://example.org"] * count, "date": ["2013-05-18T05:48:59Z"] * count,
            "file_path": ["s3://commoncrawl/crawl-data/x.warc.gz"] * count, "language": ["en"] * count,
            "language_score": [0.97] * count, "token_count": pa.array([500] * count, pa.int64()),
        },
        row_group_size=10, compression="zstd",
    )  # fmt: skip
    command = ["tokenize", "--input", f"{tmp_path}/fineweb/{dump.split('/')[0]}/*/*.parquet", "--output-prefix",
               str(tmp_path / "out"), "--tokenizer", str(demo / "tokenizer"), "--workers", "1", "--quiet"]  # fmt: skip
    assert main(command) == 0
    assert documents_of(tmp_path / "out") == expected(demo, texts)
