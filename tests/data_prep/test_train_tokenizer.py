"""Tokenizer training and the conversion to tokenizer.json: the same ids as SentencePiece, and nothing lost."""

import json

import pytest
from sentencepiece import SentencePieceProcessor

from data_prep.cli import main
from data_prep.demo import CORPUS, DOMAINS, HELD_OUT_SHARE, _training_texts
from data_prep.train_tokenizer import train_sentencepiece, train_tokenizer
from hymba_train.data.convert_tokenizer import SPACE, write_tokenizer
from hymba_train.data.indexed import IndexedTokens
from hymba_train.data.tokenizer import Tokenizer
from hymba_train.data.windows import split_held_out
from hymba_train.errors import UserError

HARD_TEXTS = [
    "", " ", "     ", "\n\n\n", "\t", "a  b   c    d ", " leading", "trailing   ", "tabs\tand\n  indents\n\n",
    "\u00e9\u4e2d\U0001f600\u200b\u0301", "\x00\x01\x7f", "<unk></s><s>", "1234567890 3.14159", "x" * 2000,
    "  " * 300 + "deep", "a\u00a0b\u3000c", "\r\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def both(demo) -> tuple[Tokenizer, Tokenizer]:
    return Tokenizer.load(demo / "tokenizer/tokenizer.json"), Tokenizer.load(demo / "tokenizer/tokenizer.model")


@pytest.mark.parametrize("domain", DOMAINS)
def test_ids_equal_sentencepiece_on_every_bundled_document(both, corpus, domain):
    fast, sentencepiece = both
    for number, text in enumerate(corpus[domain]):
        assert fast.encode(text) == sentencepiece.encode(text), f"{domain} document {number}"


@pytest.mark.parametrize("domain", DOMAINS)
def test_text_survives_on_every_bundled_document(both, corpus, domain):
    for tokenizer in both:
        for number, text in enumerate(corpus[domain]):
            assert tokenizer.decode(tokenizer.encode(text)) == text, f"{domain} document {number}"


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_ids_and_text_of_hard_cases(both, text):
    fast, sentencepiece = both
    ids = sentencepiece.encode(text)
    assert fast.encode(text) == ids
    assert fast.decode(ids) == sentencepiece.decode(ids) == text


def test_form_of_the_vocabulary(demo):
    processor = SentencePieceProcessor(model_file=str(demo / "tokenizer/tokenizer.model"))
    assert [processor.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert [processor.id_to_piece(i) for i in (3, 258)] == ["<0x00>", "<0xFF>"]
    assert processor.vocab_size() == 4096
    pieces = [processor.id_to_piece(i) for i in range(259, 4096)]
    assert not [piece for piece in pieces if sum(c.isdigit() for c in piece) and len(piece.lstrip(SPACE)) > 1]


def test_the_demo_tokenizer_never_saw_the_held_out_documents(demo):
    for domain in DOMAINS:
        training, _ = split_held_out(IndexedTokens(demo / domain), HELD_OUT_SHARE)
        assert 0 < len(_training_texts(CORPUS / f"{domain}.jsonl")) <= training.num_documents


def test_words_are_cut_apart_only_where_no_piece_crosses(tmp_path):
    # "of the" twice is a piece of its own here, so cutting between words would change ids.
    from sentencepiece import SentencePieceTrainer

    lines = ["of the people by the people of the world of the"] * 20
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "crossing"), model_type="bpe", vocab_size=300,
        byte_fallback=True, split_by_whitespace=False, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    model = (tmp_path / "crossing.model").read_bytes()
    write_tokenizer(model, tmp_path / "out")
    fast, sentencepiece = Tokenizer.load(tmp_path / "out"), Tokenizer.load(tmp_path / "crossing.model")
    pieces = [sentencepiece.piece(i) for i in sentencepiece.encode(lines[0])]
    assert any(SPACE in piece.lstrip(SPACE) for piece in pieces)
    assert fast.encode(lines[0]) == sentencepiece.encode(lines[0])


def test_pieces_of_equal_score_merge_as_in_sentencepiece(demo, tmp_path):
    # As in the tokenizer of Mistral and Hymba: runs of spaces all have the score -1e9.
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((demo / "tokenizer/tokenizer.model").read_bytes())
    runs = [piece for piece in model.pieces if not piece.piece.strip(SPACE) and len(piece.piece) > 1]
    assert len(runs) > 5
    for piece in runs:
        piece.score = -1e9
    write_tokenizer(model.SerializeToString(), tmp_path)
    fast, sentencepiece = Tokenizer.load(tmp_path / "tokenizer.json"), Tokenizer.load(tmp_path / "tokenizer.model")
    for length in range(1, 70):
        text = "if x:\n" + " " * length + "y"
        assert fast.encode(text) == sentencepiece.encode(text), length


def test_extra_special_token_comes_behind_the_vocabulary(demo, tmp_path, capsys):
    model = demo / "tokenizer/tokenizer.model"
    assert main(["convert-tokenizer", str(model), "--output", str(tmp_path), "--add-special", "[PAD]"]) == 0
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.vocab_size == 4097
    assert tokenizer.piece(4096) == "[PAD]"
    assert 4096 not in tokenizer.encode("a [PAD] b")


def test_command_line_is_deterministic(tmp_path, capsys):
    source = tmp_path / "train.jsonl"
    source.write_text((CORPUS / "speeches.jsonl").read_text("utf-8"), "utf-8")
    for out in ("one", "two"):
        args = ["train-tokenizer", "--input", str(source), "--vocab-size", "600", "--output", str(tmp_path / out)]
        assert main(args) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/one: tokenizer.json and tokenizer.model with 600 pieces")
    for name in ("tokenizer.json", "tokenizer.model"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert b"tmp" not in (tmp_path / "one" / "tokenizer.model").read_bytes()  # no path of this machine inside
    assert Tokenizer.load(tmp_path / "one").vocab_size == 600


def test_too_little_text_for_the_vocabulary():
    with pytest.raises(UserError, match=r"SentencePiece cannot train 4096 pieces: .*Vocabulary size") as caught:
        train_sentencepiece(["a few words only"], 4096)
    assert "\n" not in str(caught.value)


def test_no_text_at_all():
    with pytest.raises(UserError, match="SentencePiece cannot train 4096 pieces: "):
        train_sentencepiece([], 4096)


def test_vocabulary_smaller_than_the_bytes():
    with pytest.raises(UserError, match="--vocab-size 259: special tokens and bytes alone take 259"):
        train_sentencepiece(["text"], 259)


def test_bad_line_is_named_and_ends_it_if_asked(tmp_path, capsys):
    source = tmp_path / "train.jsonl"
    source.write_text(json.dumps({"text": "it is a truth universally acknowledged " * 9}) + "\n{bad\n")
    with pytest.raises(UserError, match=r"train.jsonl:2: invalid JSON at column 2"):
        train_tokenizer([source], tmp_path / "out", 300, max_bad_lines=0)
    command = ["train-tokenizer", "--input", str(source), "--vocab-size", "290", "--output", str(tmp_path / "out")]
    assert main([*command, "--max-bad-lines", "0"]) == 2
    assert not (tmp_path / "out").exists()
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert out.endswith("; 1 bad lines left out\n")
    assert f"bad line: {source}:2: invalid JSON at column 2" in err


def test_not_a_model(tmp_path, capsys):
    (tmp_path / "x.model").write_bytes(b"no model")
    assert main(["convert-tokenizer", str(tmp_path / "x.model"), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: not a SentencePiece model: ")
    assert main(["convert-tokenizer", str(tmp_path / "y.model"), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/y.model does not exist\n"
