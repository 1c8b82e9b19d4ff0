"""R18: keys and tokens of the environment are in nothing that a run writes, and credentials in a configuration are
refused before anything is written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hymba_train.config import compose, load_frozen
from hymba_train.config.secrets import NAME
from hymba_train.errors import UserError
from tests.train.tiny_run import write_data

pytestmark = pytest.mark.reliability
CANARY = "c4n4ry-7f3a"
VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "AZURE_STORAGE_KEY")


@pytest.fixture(scope="module")
def run(warm, tmp_path_factory) -> tuple[Path, str]:
    """(directory, output) of a run with canaries in its environment, stopped and started again, and logging all."""
    path = tmp_path_factory.mktemp("secrets")
    write_data(path)
    patch = f"""
import os, resource
from pathlib import Path
from hymba_train.config import freeze_run
os.environ.update({{name: {CANARY!r} for name in {VARIABLES!r}}})
os.environ["WANDB_MODE"] = "disabled"
from hymba_train.train import main as training
train = training.train
def freezing(config, plan):
    freeze_run(config)
    Path(config.run.directory, "ps").write_bytes(Path("/proc/self/cmdline").read_bytes())
    return train(config, plan)
training.train = freezing
"""
    for last in (5, None):
        code, output = warm.train(
            path / "runs" / "run",
            patch=patch,
            run__train_steps=last,
            logging__tensorboard=True,
            checkpoint__save_interval=2,
        )
        assert code in (0, 75), output
    return path, output


def test_no_secret_of_the_environment_is_written_or_said(run):
    path, output = run
    files = [p for p in path.rglob("*") if p.is_file()]
    assert {"resolved.yaml", "metrics.jsonl", "checkpoint.json", "ps"} <= {p.name for p in files}
    assert [p for p in files if CANARY.encode() in p.read_bytes()] == []
    assert CANARY not in output


def test_what_holds_state_is_its_owners_alone(run):
    path, _ = run
    for directory in (path / "runs" / "run", path / "runs" / "run" / "checkpoints",
                      *(path / "runs" / "run" / "checkpoints").glob("step_*")):  # fmt: skip
        if directory.name != "run":  # made by the test
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700, directory


def test_a_run_directory_is_made_private(tmp_path):
    from hymba_train.config import freeze_run

    config = compose(["experiment=demo", f"run.directory={tmp_path}", "run.name=new"])
    freeze_run(config)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


@pytest.mark.parametrize("name", VARIABLES)
def test_the_environment_gives_no_secret_to_a_configuration(name, monkeypatch):
    monkeypatch.setenv(name, CANARY)
    with pytest.raises(UserError, match=rf"run\.name: takes {name} from the environment") as error:
        compose(["experiment=demo", f"run.name='${{oc.env:{name}}}'"])
    assert CANARY not in str(error.value)


def test_other_variables_may_be_used(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert compose(["experiment=demo", "run.directory='${oc.env:SCRATCH}/runs'"]).run.directory == "/scratch/me/runs"
    assert not NAME.search("TOKENIZER_DIR") and not NAME.search("KEYBOARD")


@pytest.mark.parametrize(
    "url",
    [
        f"s3://user:{CANARY}@host/bucket/a", f"https://{CANARY}@host/a", f"https://host/a?X-Amz-Signature={CANARY}",
        f"https://account.blob.net/a?sv=1&sig={CANARY}", f"https://host/a?token={CANARY}",
    ],
)  # fmt: skip
def test_a_url_with_credentials_is_refused_and_not_repeated(url, tmp_path):
    with pytest.raises(UserError, match=r"data\.sources\.x\.path: is a URL with credentials") as error:
        compose(["experiment=demo", f"data.sources.x.path='{url}'"])
    assert CANARY not in str(error.value)
    frozen = tmp_path / "resolved.yaml"
    frozen.write_text(f"data: {{path: '{url}'}}\n")
    with pytest.raises(UserError, match=r"data\.path: is a URL with credentials") as error:
        load_frozen(frozen)
    assert CANARY not in str(error.value)


def test_a_plain_url_is_taken():
    compose(["experiment=demo", "data.sources.x.path='s3://bucket/a?versionId=3'"])


def test_the_canaries_are_found_where_they_are(tmp_path):
    """Control: the search would find one."""
    os.environ["CANARY"] = CANARY
    (tmp_path / "leak").write_text(os.environ.pop("CANARY"))
    assert [p for p in tmp_path.rglob("*") if CANARY.encode() in p.read_bytes()] == [tmp_path / "leak"]
