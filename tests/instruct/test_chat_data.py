"""Conversations to tokens and masks: what the published template gives, and loss on the answers alone."""

import numpy as np
import pytest

from data_prep.chat import ChatSettings, ConversationEncoder
from data_prep.conversations import conversation_of, pair_of
from data_prep.records import parse_object
from hymba_train.convert.tokenizer_files import write_chat_template, write_tokenizer_files
from hymba_train.data.answers import LossMask
from hymba_train.data.chat_template import render
from hymba_train.data.indexed import IndexedTokens
from hymba_train.data.manifest import read_manifest
from hymba_train.data.tokenizer import Tokenizer
from tests.instruct import tiny

TOOLS = [{"name": "weather", "parameters": {"city": "text \u00e9"}}]
TALK = [
    {"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "Hi <extra_id_1>"},
    {"role": "assistant", "content": "Hello,\n  you!"}, {"role": "tool", "content": "{}"},
    {"role": "user", "content": "\n\u4e2d?"}, {"role": "assistant", "content": "No."},
]  # fmt: skip
EXTRAS = [{}, {"tools": TOOLS}, {"contexts": [" one ", "two"]}, {"tools": TOOLS, "contexts": ["one"]}]


@pytest.fixture(scope="module")
def tokenizer(instruct):
    return Tokenizer.load(instruct / "tokenizer")


@pytest.fixture(scope="module")
def transformers_tokenizer(instruct, tmp_path_factory):
    """As an exported instruct model has it."""
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("exported")
    write_tokenizer_files(instruct / "tokenizer", directory)
    write_chat_template(directory)
    return transformers.AutoTokenizer.from_pretrained(directory)


def encoder(tokenizer, **settings) -> ConversationEncoder:
    return ConversationEncoder(ChatSettings(**{"pairs": False, "seq_length": 999, **settings}), tokenizer, np.uint16)


def test_render_is_the_published_template():
    """Written out by hand (hymba-architecture 1.2)."""
    text = "".join(piece for piece, _ in render(TALK, TOOLS, ["one"]))
    assert text == (
        '<extra_id_0>System\nBe brief.\n\n<tool> {"name": "weather", "parameters": {"city": "text \u00e9"}} </tool>\n\n'
        "<context> one </context>\n\n<extra_id_1>User\nHi <extra_id_1>\n<extra_id_1>Assistant\nHello,\n  you!\n"
        "<extra_id_1>Tool\n{}\n<extra_id_1>User\n\u4e2d?\n<extra_id_1>Assistant\nNo.\n"
    )
    assert [piece for piece, answer in render(TALK) if answer is not None] == ["Hello,\n  you!\n", "No.\n"]
    assert render(TALK[1:])[0][0] == "<extra_id_0>System\n\n"


@pytest.mark.parametrize("extras", EXTRAS, ids=["plain", "tools", "contexts", "both"])
@pytest.mark.parametrize("messages", [TALK, TALK[1:3]], ids=["six", "two"])
def test_tokens_are_those_of_apply_chat_template(messages, extras, tokenizer, transformers_tokenizer):
    tokens, _ = encoder(tokenizer).encode(conversation_of({"messages": messages, **extras}))
    template = transformers_tokenizer.apply_chat_template
    expected = template(messages, tokenize=True, return_dict=False, **extras)
    assert tokens.tolist() == [*expected, tokenizer.eod_id]
    text = template(messages, tokenize=False, **extras)
    assert text == "".join(p for p, _ in render(messages, **extras))


def test_the_mask_begins_where_generation_does_and_ends_with_the_turn(tokenizer, transformers_tokenizer):
    tokens, mask = encoder(tokenizer).encode(conversation_of({"messages": TALK}))
    edges = np.flatnonzero(np.diff(mask)) + 1
    template = transformers_tokenizer.apply_chat_template
    prompts = [template(TALK[:n], add_generation_prompt=True, return_dict=False) for n in (2, 5)]
    turn_end = template(TALK[:3], return_dict=False)
    assert edges.tolist() == [len(prompts[0]), len(turn_end), len(prompts[1])]
    for prompt in prompts:
        assert tokens[: len(prompt)].tolist() == prompt
    assert mask[-1] == 1 and tokens[-1] == tokenizer.eod_id
    answers = [part for part in np.split(tokens, edges) if part.size][1::2]
    assert [tokenizer.decode(a.tolist()) for a in answers] == ["Hello,\n  you!\n", "No.\n"]


def test_of_a_pair_only_what_differs_carries_loss(tokenizer):
    record = {"prompt": TALK[:5], "chosen": "Yes.", "rejected": [{"role": "assistant", "content": "No."}]}
    for conversation, text in zip(pair_of(record), ("Yes.\n", "No.\n"), strict=True):
        tokens, mask = encoder(tokenizer).encode(conversation)
        assert tokenizer.decode(tokens[mask == 1].tolist()) == text, "the answer inside the prompt carries none"
    whole = {"prompt": "ignored", "chosen": TALK, "rejected": [*TALK[:5], {"role": "assistant", "content": "Maybe."}]}
    assert [c.num_given for c in pair_of(whole)] == [5, 5]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "a"}, "neither 'messages' nor"),
        ({"messages": []}, "neither a text nor a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message of the assistant"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "the role 'bot'"),
        ({"messages": [{"role": "user", "content": None}]}, "not a string"),
        ({"messages": [TALK[1], TALK[0], TALK[2]]}, "can only be the first"),
        ({"messages": [TALK[1], {"role": "assistant", "content": " \n"}]}, "is empty"),
        ({"prompt": "a", "completion": 3}, "'completion' is neither"),
    ],
)
def test_what_is_no_conversation(record, reason):
    with pytest.raises(ValueError, match=reason):
        conversation_of(record)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": " b "}, "are equal"),
        ({"chosen": TALK[1:3], "rejected": TALK[4:]}, "do not answer one prompt"),
        ({"chosen": "a", "rejected": "b"}, "do not answer one prompt"),
    ],
)
def test_what_is_no_pair(record, reason):
    with pytest.raises(ValueError, match=reason):
        pair_of(record)


def chat(directory, *flags, name="in.jsonl", records=None, seq_length=tiny.SEQ_LENGTH) -> int:
    if records is not None:
        tiny.write_jsonl(directory / name, records)
    return tiny.data_command(
        "chat", "--input", directory / name, "--output-dir", directory / "out", "--seq-length", seq_length,
        "--workers", 1, "--quiet", *flags,
    )  # fmt: skip


def test_bad_lines_and_long_ones_are_counted(instruct, tmp_path, capsys):
    long = {"prompt": "a", "completion": "word " * 200}
    records = [*tiny.conversations(), "{", {"messages": 3}, long]
    tokenizer = ["--tokenizer", instruct / "tokenizer"]
    assert chat(tmp_path, *tokenizer, records=records) == 0
    out = capsys.readouterr().out
    assert (
        "20 conversations" in out and "2 bad lines left out" in out and "1 longer than 384 tokens and left out" in out
    )
    bad = (tmp_path / "out" / "in.bad_lines.txt").read_text().splitlines()
    assert [line.split(":")[1] for line in bad] == ["21", "22"]
    prefix = tmp_path / "out" / "in"
    before = prefix.with_suffix(".mask").stat().st_mtime_ns
    assert chat(tmp_path, *tokenizer) == 0 and "1 of 1 were done before" in capsys.readouterr().out
    assert prefix.with_suffix(".mask").stat().st_mtime_ns == before
    assert chat(tmp_path, *tokenizer, seq_length=64) == 2 and "pass --overwrite" in capsys.readouterr().err
    assert chat(tmp_path, *tokenizer, "--too-long", "cut", "--overwrite") == 0
    manifest = read_manifest(prefix)
    assert (manifest.num_documents, manifest.chat["num_cut"], manifest.chat["num_too_long"]) == (21, 1, 0)
    assert IndexedTokens(prefix).document(20).size == tiny.SEQ_LENGTH + 1
    assert chat(tmp_path, *tokenizer, "--max-bad-lines", 0, "--overwrite", name="other.jsonl", records=records) == 2
    assert not list((tmp_path / "out").glob("other*")) and not list((tmp_path / "out").glob("*.tmp-*"))


def test_mask_and_tokens_lie_side_by_side(instruct, tokenizer):
    tokens, manifest = IndexedTokens(instruct / "talk"), read_manifest(instruct / "talk")
    mask = LossMask(instruct / "talk", manifest.chat["mask"])
    for number, record in enumerate(tiny.conversations()):
        expected, expected_mask = encoder(tokenizer).encode(conversation_of(record))
        begin, end = tokens.document_start(number), tokens.document_start(number + 1)
        assert tokens.tokens(begin, end).tolist() == expected.tolist()
        assert mask.tokens(begin, end).tolist() == expected_mask.tolist()
    assert manifest.chat["num_answer_tokens"] == mask.tokens(0, tokens.num_tokens).sum()


def test_several_workers_write_the_same(instruct, tmp_path):
    tiny.write_jsonl(tmp_path / "a.jsonl", tiny.conversations() * 600)  # more than a chunk
    flags = ["--tokenizer", instruct / "tokenizer", "--quiet", "--seq-length", tiny.SEQ_LENGTH]
    for number in (1, 2):
        out = tmp_path / str(number)
        assert (
            tiny.data_command("chat", "--input", tmp_path / "a.jsonl", "--output-dir", out, "--workers", number, *flags)
            == 0
        )
    for suffix in ("bin", "idx", "mask", "json"):
        assert (tmp_path / "1" / f"a.{suffix}").read_bytes() == (tmp_path / "2" / f"a.{suffix}").read_bytes()


def test_looking_shows_what_carries_loss(instruct, capsys):
    assert tiny.data_command("inspect", instruct / "talk", "--document", 2, "--tokenizer", instruct / "tokenizer") == 0
    shown = capsys.readouterr().out
    assert "<extra_id_1>Assistant\n\u27e64 abab\n\u27e7<extra_id_1>User\nSure?" in shown
    assert "Assistant\n\u27e6Yes!\n</s>\u27e7" in shown
    assert tiny.data_command("inspect", "--sample", 0, *tiny.overrides(instruct, "sft")) == 0
    assert "Assistant\n\u27e6" in capsys.readouterr().out
    assert tiny.data_command("validate", instruct / "talk", instruct / "choice") == 0
    assert capsys.readouterr().out.count("a byte a token") == 2


def test_a_changed_mask_is_found(instruct, tmp_path, capsys):
    for suffix in ("bin", "idx", "json", "mask"):
        (tmp_path / f"talk.{suffix}").write_bytes((instruct / f"talk.{suffix}").read_bytes())
    content = bytearray((tmp_path / "talk.mask").read_bytes())
    content[100] ^= 1
    (tmp_path / "talk.mask").write_bytes(content)
    assert tiny.data_command("validate", tmp_path / "talk") == 2
    assert "talk.mask differs from its manifest" in capsys.readouterr().err


def test_conversations_are_not_merged(instruct, tmp_path, capsys):
    assert (
        tiny.data_command("merge", "--input", instruct / "talk", instruct / "choice", "--output-prefix", tmp_path / "m")
        == 2
    )
    assert "whose loss mask cannot be merged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"a": "\xff"}', "invalid UTF-8 at byte 7"),
        (b'{"a": }', "invalid JSON at column 7"),
        (b"[1]", "not a JSON object"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_a_line_that_is_no_record_says_why(line, says):
    with pytest.raises(ValueError, match=says):
        parse_object(line)
