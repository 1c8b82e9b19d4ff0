"""Every key is documented, and what the documentation promises is what is checked."""

import re

from hymba_train.config import compose, document_keys, document_keys_markdown, flatten, key_docs, meaning_of, to_plain
from hymba_train.config.choices import BELOW_1, BOUNDS, CHOICES, MAY_BE_OPEN, POSITIVE
from hymba_train.config.typed import schema_keys


def test_every_key_has_a_meaning():
    docs = key_docs()
    assert [d.key for d in docs if not re.match(r"^\S.*\.$", d.meaning)] == []
    assert {d.key for d in docs} >= set(schema_keys())
    described = {d.key for d in docs}
    composed = flatten(to_plain(compose(["experiment=pretrain_1p5b"])))
    assert [k for k in composed if not meaning_of(k) and ".blend." not in k] == []
    assert "data.phases.NAME.rampup_batch_size" in described


def test_meaning_of_a_key_with_names_in_it():
    assert meaning_of("data.phases.stable.seq_length") == "Text tokens S in a sequence."
    assert meaning_of("data.phases.stable.no_such_key") == ""


def test_words_in_the_documentation_are_the_ones_that_are_accepted():
    for key, words in CHOICES.items():
        meaning = {d.key: d.meaning for d in key_docs()}[key]
        if key == "data.phases.NAME.rope_type":
            meaning = meaning_of("model.rope_type")
        missing = [w for w in words if not re.search(rf"\b{w}\b", meaning)]
        assert not missing, f"{key}: {missing} not in its documentation: {meaning}"


def test_tables_of_checks_name_real_keys():
    known = {d.key for d in key_docs()} | {"data.phases.NAME.blend.NAME"}
    for table in (CHOICES, BOUNDS, POSITIVE, BELOW_1, MAY_BE_OPEN):
        assert set(table) <= known, set(table) - known


def test_text_and_markdown_hold_all_keys():
    text, markdown = document_keys(), document_keys_markdown()
    for doc in key_docs():
        assert f"  {doc.key} ({doc.type}; default {doc.default})" in text
        assert f"| `{doc.key}` | {doc.type} |" in markdown
    assert "optim.adam_beta2 (float; default 0.95)" in text
    assert "model.hidden_size (int; default to be given)" in text
    assert "model.window_size (int or null; default null)" in text
    assert max(map(len, text.splitlines())) <= 130
