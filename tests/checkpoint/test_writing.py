"""What a rank writes: read back, described tensor by tensor, and damage in it named by tensor."""

from __future__ import annotations

import json

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from hymba_train.checkpoint import manifest, writing
from hymba_train.checkpoint.share import Share


def a_share(**tensors) -> Share:
    entries = [(MetadataIndex(name, torch.Size([0] * t.dim())), t) for name, t in tensors.items()]
    return Share({"__0_0.distcp": entries}, lambda results: None)


def test_files_hold_the_tensors_at_the_places_that_the_report_names(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    writing.write_share(a_share(a=whole, view=whole[1:2], empty=torch.zeros(0, 4)), tmp_path, rank=3)
    file = json.loads((tmp_path / "written_00003.json").read_text())["__0_0.distcp"]
    content = (tmp_path / "__0_0.distcp").read_bytes()
    assert file["num_bytes"] == len(content) and [t["name"] for t in file["tensors"]] == ["a", "view", "empty"]
    for entry, expected in zip(file["tensors"], (whole, whole[1:2], torch.zeros(0, 4)), strict=True):
        part = tmp_path / "part"
        part.write_bytes(content[entry["offset"] : entry["offset"] + entry["num_bytes"]])
        assert torch.equal(torch.load(part, weights_only=True), expected)


def test_what_does_not_read_back_is_an_error(tmp_path, monkeypatch):
    write = writing._write_file

    def write_and_damage(path, entries):
        result = write(path, entries)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        return result

    monkeypatch.setattr(writing, "_write_file", write_and_damage)
    with pytest.raises(OSError, match=r"__0_0\.distcp: reads back differently"):
        writing.write_share(a_share(a=torch.ones(100)), tmp_path, rank=0)
    assert not (tmp_path / "written_00000.json").exists()


def test_an_existing_file_is_never_written_into(tmp_path):
    (tmp_path / "__0_0.distcp").write_bytes(b"of somebody")
    with pytest.raises(FileExistsError):
        writing.write_share(a_share(a=torch.ones(1)), tmp_path, rank=0)
    assert (tmp_path / "__0_0.distcp").read_bytes() == b"of somebody"


def test_damage_is_named_by_tensor(tmp_path):
    writing.write_share(a_share(a=torch.ones(500), b=torch.ones(500)), tmp_path, rank=0)
    tensors = json.loads((tmp_path / "written_00000.json").read_text())["__0_0.distcp"]["tensors"]
    manifest.write_tensors(
        tmp_path, {"__0_0.distcp": [(t["name"], t["offset"], t["num_bytes"], t["xxh3_128"]) for t in tensors]}
    )
    entries = manifest.make(tmp_path)
    content = bytearray((tmp_path / "__0_0.distcp").read_bytes())
    content[tensors[1]["offset"] + 1000] ^= 4
    (tmp_path / "__0_0.distcp").write_bytes(content)
    (problem,) = manifest.compare(tmp_path, entries, sorted(entries))
    assert "__0_0.distcp: is damaged" in problem and problem.endswith("(in b)")


def test_a_directory_that_could_not_be_looked_at_is_not_remembered_as_whole(tmp_path):
    gone = tmp_path / "step_0000001"
    manifest.remember(gone)
    assert not manifest.is_remembered(gone) and manifest.verify(gone) != []
