"""One interface over tokenizer.json and SentencePiece .model files."""

import hashlib

import pytest

from hymba_train.data.tokenizer import Tokenizer
from hymba_train.errors import UserError

TEXT = "It is a truth universally acknowledged,\n\n    def f(x): return 3.14\t# \u00e9\U0001f600"


@pytest.fixture(params=["tokenizer", "tokenizer/tokenizer.json", "tokenizer/tokenizer.model"])
def tokenizer(request, demo) -> Tokenizer:
    return Tokenizer.load(demo / request.param)


def test_facts(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eod_id) == (4096, 1, 2)
    assert tokenizer.content_hash == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()


def test_a_directory_means_its_tokenizer_json(demo):
    assert Tokenizer.load(demo / "tokenizer").path.name == "tokenizer.json"


@pytest.mark.parametrize("text", [TEXT, "", " ", "  two leading spaces", "trailing  ", "\n", "\x00", "</s>", "a<s>b"])
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < 4096 for i in ids)


def test_ends_are_added_only_when_asked_for(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert 1 not in ids
    assert 2 not in ids
    assert tokenizer.encode(TEXT, add_bos=True, add_eod=True) == [1, *ids, 2]
    assert tokenizer.decode([1, *ids, 2]) == TEXT


def test_special_names_in_a_text_are_plain_text(tokenizer):
    # Else a web page that writes "</s>" would end its own document.
    assert 2 not in tokenizer.encode("the end</s>of <s> it")


def test_special_tokens_can_be_shown(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("the end"), 2], skip_special=False) == "the end</s>"
    assert tokenizer.piece(2) == "</s>"


def test_batch_equals_one_by_one(tokenizer):
    texts = [TEXT, "", "second"]
    assert tokenizer.encode_batch(texts, add_eod=True) == [tokenizer.encode(text, add_eod=True) for text in texts]


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer at .*: give a directory with tokenizer.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_not_a_tokenizer(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"hello": 1}')
    with pytest.raises(UserError, match=f"{name} cannot be read as a tokenizer: ") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_end_of_document_token(tmp_path):
    from tokenizers import Tokenizer as Fast
    from tokenizers.models import WordLevel

    Fast(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"has no end-of-document token: none of </s>, <\|endoftext\|>"):
        Tokenizer.load(tmp_path)


def test_gpt_style_names(tmp_path):
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Fast
    from tokenizers.models import WordLevel

    fast = Fast(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    fast.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.eod_id, tokenizer.bos_id, tokenizer.vocab_size) == (2, None, 3)
    with pytest.raises(UserError, match="has no token that begins a text"):
        tokenizer.encode("a", add_bos=True)
