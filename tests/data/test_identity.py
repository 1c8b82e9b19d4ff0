"""What a checkpoint knows of its data, and what a run that goes on may change."""

import copy

import pytest

from hymba_train.data.identity import DataRecord, changes
from hymba_train.errors import UserError

IDENTITY = {
    "tokenizer": "t1",
    "seed": 1,
    "document_mask": True,
    "phases": [
        {"name": "stable", "seq_length": 64, "packing": "concat", "packs": {}, "blend": {"web": "1"}},
        {"name": "anneal", "seq_length": 64, "packing": "best_fit", "packs": {"code": "p1"}, "blend": {"code": "1/2",
         "web": "1/2"}},
        {"name": "long", "seq_length": 128, "packing": "concat", "packs": {}, "blend": {"books": "1"}},
    ],
    "sources": {name: {"files": f"{name}1", "training_tokens": 1000} for name in ("web", "code", "books")},
}  # fmt: skip


def changed(*path, to):
    identity = copy.deepcopy(IDENTITY)
    at = identity
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = to
    return identity


@pytest.mark.parametrize(
    ("now", "phase", "expected"),
    [
        (IDENTITY, 2, []),
        (changed("tokenizer", to="t2"), 0, ["data.tokenizer (sha256): t1 -> t2"]),
        (changed("seed", to=2), 0, ["run.seed: 1 -> 2"]),
        (changed("document_mask", to=False), 0, ["data.document_mask: True -> False"]),
        (changed("sources", "web", "files", to="web2"), 0, ["data.sources.web (files): web1 -> web2"]),
        (changed("sources", "web", "training_tokens", to=9), 1, ["data.sources.web (training_tokens): 1000 -> 9"]),
        # Sources and phases that are only read later may change.
        (changed("sources", "code", "files", to="code2"), 0, []),
        (changed("sources", "code", "files", to="code2"), 1, ["data.sources.code (files): code1 -> code2"]),
        (changed("phases", 1, "seq_length", to=32), 0, []),
        (changed("phases", 1, "seq_length", to=32), 1, ["data.phases.anneal.seq_length: 64 -> 32"]),
        (changed("phases", 0, "blend", to={"web": "2/3", "code": "1/3"}), 1,
         ["data.phases.stable.blend: {'web': '1'} -> {'web': '2/3', 'code': '1/3'}"]),
        (changed("phases", 1, "packs", to={"code": "p2"}), 1,
         ["data.phases.anneal.packs: {'code': 'p1'} -> {'code': 'p2'}"]),
        (changed("phases", to=IDENTITY["phases"][:2]), 1, []),
        (changed("phases", to=IDENTITY["phases"][1:2]), 0, [
            "data.phases.anneal.name: stable -> anneal", "data.phases.anneal.packing: concat -> best_fit",
            "data.phases.anneal.packs: {} -> {'code': 'p1'}",
            "data.phases.anneal.blend: {'web': '1'} -> {'code': '1/2', 'web': '1/2'}"]),
    ],
)  # fmt: skip
def test_what_decides_the_samples_so_far_must_be_the_same(now, phase, expected):
    assert changes(IDENTITY, now, phase) == expected


def test_refused_unless_accepted_and_then_recorded_for_ever():
    saved = {"identity": IDENTITY, "accepted_changes": ["step 5: run.seed: 0 -> 1"]}
    record = DataRecord(changed("tokenizer", to="t2"))
    with pytest.raises(UserError) as caught:
        record.resume(saved, {"step": 70, "phase": 1}, False, "step_0000070")
    assert str(caught.value) == (
        "step_0000070: data.tokenizer (sha256): t1 -> t2: going on would repeat, skip or change samples; restore it, "
        "or accept that with checkpoint.accept_changed_data=true (it is recorded)"
    )
    assert record.resume(saved, {"step": 70, "phase": 1}, True, "x") == ["data.tokenizer (sha256): t1 -> t2"]
    later = record.to_dict()
    assert later["accepted_changes"] == ["step 5: run.seed: 0 -> 1", "step 70: data.tokenizer (sha256): t1 -> t2"]
    # The next restart finds its own identity in the checkpoint, and keeps the list.
    again = DataRecord(changed("tokenizer", to="t2"))
    assert again.resume(later, {"step": 80, "phase": 1}, False, "x") == []
    assert again.to_dict() == later


def test_a_checkpoint_without_a_record_has_nothing_to_compare():
    assert DataRecord(IDENTITY).resume(None, {"step": 0, "phase": 0}, False, "imported") == []
