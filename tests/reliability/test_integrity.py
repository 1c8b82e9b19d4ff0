"""R4, R6: damage anywhere in a checkpoint is found and named; an older one is taken; never random weights."""

from __future__ import annotations

import random
import shutil

import pytest

from hymba_train.checkpoint import manifest, together
from hymba_train.checkpoint.load import find_source
from hymba_train.errors import UserError
from tests.train.tiny_run import tiny_config

pytestmark = pytest.mark.reliability
FLIPS_PER_FILE = 50
TRUNCATIONS_PER_FILE = 20


@pytest.fixture(autouse=True)
def process_group(lone_runtime):
    pass


def source(checkpoints):
    config = tiny_config(checkpoints.parent.parent, **{"run.directory": str(checkpoints.parent.parent)})
    return find_source(config, checkpoints.parent)


def flip(path, offset: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def files(step):
    return [step / name for name in (*manifest.file_names(step), manifest.MANIFEST)]


def test_a_whole_checkpoint_is_taken(checkpoints):
    found = source(checkpoints)
    assert found.path.name == "step_0000010" and found.remarks == ()
    assert together.verify(found.path) == []


def test_every_flipped_bit_and_every_truncation_is_found_and_the_file_named(checkpoints):
    step, rng, missed = checkpoints / "step_0000010", random.Random(6), []
    assert len(files(step)) >= 5
    for path in files(step):
        content = path.read_bytes()
        damages = [("flip", rng.randrange(len(content)), rng.randrange(8)) for _ in range(FLIPS_PER_FILE)]
        damages += [("cut", rng.randrange(len(content)), 0) for _ in range(TRUNCATIONS_PER_FILE)]
        for kind, offset, bit in damages:
            if kind == "flip":
                flip(path, offset, bit)
            else:
                path.write_bytes(content[:offset])
            problems = together.verify(step)
            if not (len(problems) == 1 and problems[0].startswith(f"{path}: ")):
                missed.append((path.name, kind, offset, bit, problems))
            path.write_bytes(content)
    assert missed == []
    assert together.verify(step) == []


def test_a_missing_and_a_foreign_file_are_named(checkpoints):
    step = checkpoints / "step_0000010"
    (step / "common.pt").write_bytes(b"x")
    data = next(step.glob("*.distcp"))
    data.unlink()
    problems = together.verify(step)
    assert [p.split(":")[0] for p in problems] == [str(step / "common.pt"), str(data)]


@pytest.mark.parametrize("name", ["__0_0.distcp", "checkpoint.json", "manifest.json", ".metadata", "metadata.json"])
def test_the_newest_older_checkpoint_that_verifies_is_taken(checkpoints, name, caplog):
    flip(checkpoints / "step_0000010" / name, 40)
    assert source(checkpoints).path.name == "step_0000005"
    (warning,) = [r.getMessage() for r in caplog.records]
    assert f"step_0000010/{name}" in warning and "looking for an older checkpoint" in warning


def test_a_checkpoint_without_manifest_is_not_trusted(checkpoints):
    (checkpoints / "step_0000010" / manifest.MANIFEST).unlink()
    assert source(checkpoints).path.name == "step_0000005"


def test_a_run_with_damaged_checkpoints_only_never_starts_from_random_weights(checkpoints):
    for step in ("step_0000005", "step_0000010"):
        flip(checkpoints / step / "__0_0.distcp", 1000)
    with pytest.raises(UserError, match="no checkpoint can be trusted") as error:
        source(checkpoints)
    assert [step in str(error.value) for step in ("step_0000005", "step_0000010")] == [True, True]


@pytest.mark.parametrize("content", ["", "garbage\0", "step_0000007", "step_0000099", None])
def test_a_torn_pointer_and_a_damaged_newest_one_together(checkpoints, content):
    if content is None:
        (checkpoints / "latest").unlink()
    else:
        (checkpoints / "latest").write_text(content)
    flip(checkpoints / "step_0000010" / "__0_0.distcp", 1000)
    shutil.copytree(checkpoints / "step_0000010", checkpoints / "step_0000007.incomplete")
    assert source(checkpoints).path.name == "step_0000005"


def test_a_damaged_checkpoint_named_by_the_user_is_refused_not_replaced(checkpoints):
    flip(checkpoints / "step_0000010" / "__0_0.distcp", 1000)
    load = str(checkpoints / "step_0000010")
    config = tiny_config(checkpoints.parent.parent, **{"run.name": "new", "checkpoint.load": load})
    with pytest.raises(UserError, match="distcp: is damaged"):
        find_source(config, checkpoints.parent.parent / "new")


def test_ranks_share_all_files_and_none_twice():
    sizes = {f"file{i}": i % 7 for i in range(23)}
    shares = [manifest.share(sizes, rank, 4) for rank in range(4)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
