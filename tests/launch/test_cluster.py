"""Cluster files: strict, every problem in one line with its key."""

from __future__ import annotations

import re

import pytest
import yaml

from hymba_train.config import TO_BE_GIVEN, recipes_directory
from hymba_train.config.typed import flatten, schema_keys, to_plain
from hymba_train.errors import UserError
from launch.cluster import ClusterConfig, ClusterFile
from launch.cluster_checks import MANAGED
from launch.cluster_files import cluster_options, load_cluster

CLUSTERS = recipes_directory() / "cluster"


def problems(*overrides: str, cluster: str = "local_test") -> list[str]:
    with pytest.raises(UserError) as error:
        load_cluster([f"cluster={cluster}", *overrides])
    return list(error.value.problems)


BROKEN = [
    ("cluster.nodez=3", "cluster.nodez: unknown key; did you mean cluster.nodes?"),
    ("cluster.restart.max_requeue=3", "did you mean cluster.restart.max_requeues?"),
    ("cluster.nodes=two", "cluster.nodes: expected int or null; got 'two'"),
    ("cluster.nodes=0", "cluster.nodes=0: must be at least 1"),
    ("cluster.exclusive=1", "cluster.exclusive: expected bool"),
    ("cluster.time_limit=soon", "cluster.time_limit=soon: write HH:MM:SS"),
    ("cluster.time_limit=00:00:00", "write HH:MM:SS"),
    ("cluster.time_limit=00:00:45", "must be below the time limit of 45 seconds"),
    ("cluster.restart.signal_seconds_before_limit=7200", "must be below the time limit of 1200 seconds"),
    ("cluster.processes_per_node=null", "cluster.processes_per_node: to be given where gpus_per_node is 0"),
    ("cluster.gpus_per_node=1", "cluster.processes_per_node=2: more than the 1 GPUs of a node"),
    ("cluster.extra_sbatch=[--nodes=4]", "cluster.nodes sets it; leave it out"),
    ("cluster.extra_sbatch=[-o x]", "the script sets it; leave it out"),
    ("cluster.extra_sbatch=[constraint=h100]", "is no option"),
    ("cluster.extra_srun=['']", "must be one line of printable text"),
    ('cluster.partition="a\nb"', "cluster.partition: must be one line of printable text"),
    ("cluster.container.mounts=[/a:/a]", "there is no container"),
    ("cluster.container={image: x, mounts: [data]}", "is not /SOURCE:/TARGET[:FLAGS]"),
    ("cluster.environment.HF_TOKEN={value: x, reason: y}", "looks like a secret"),
    ("cluster.environment.9X={value: x, reason: y}", "no name of an environment variable"),
    ("cluster.environment.X={value: x}", "cluster.environment.X.reason: to be given"),
    ("cluster.environment.X={value: 1, reason: y}", "cluster.environment.X.value: expected text"),
    ("cluster.restart.chain=3", "a job that requeues itself needs no chain"),
    ("cluster.nodes.x=3", "nodes holds no keys"),
    ("cluster.nodes", "write cluster.KEY=VALUE"),
    ("cluster.setup=[", "the value is not YAML"),
]


@pytest.mark.parametrize(("override", "expected"), BROKEN, ids=[b[0].replace("\n", " ") for b in BROKEN])
def test_a_broken_override_is_one_line(override, expected):
    (line,) = problems(override)
    assert expected in line and "\n" not in line


def test_all_problems_at_once():
    assert len(problems("cluster.nodes=0", "cluster.time_limit=soon", "cluster.extra_srun=[x]")) == 3


def test_a_container_and_a_venv_contradict_each_other():
    (line,) = problems("cluster.venv=/v", "cluster.container.image=/x.sqsh")
    assert "leave out venv, or container.image" in line


def test_which_cluster():
    with pytest.raises(UserError, match=r"cluster: not chosen; give one cluster=NAME \(.*local_test"):
        load_cluster(["cluster.nodes=2"])
    with pytest.raises(UserError, match="given twice"):
        load_cluster(["cluster=local_test", "cluster=template"])
    with pytest.raises(UserError, match="did you mean local_test"):
        load_cluster(["cluster=local_tset"])


def test_text_needs_no_quotes_on_the_command_line():
    _, cluster = load_cluster(
        ["cluster=local_test", "cluster.time_limit=04:00:00", "cluster.memory_per_node=0", "cluster.qos=null"]
    )
    assert (cluster.time_limit, cluster.memory_per_node, cluster.qos) == ("04:00:00", "0", None)


def test_an_unquoted_time_in_a_file_is_explained(tmp_path):
    (tmp_path / "c.yaml").write_text("time_limit: 12:00:00\ngpus_per_node: 8\n")
    (line,) = problems(cluster=str(tmp_path / "c.yaml"))
    assert 'quote it: "04:00:00"' in line


@pytest.mark.parametrize("text", ["", "- a\n", "a: [\n", "!!python/object/apply:os.system [id]\n"])
def test_files_that_are_no_cluster(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    (line,) = problems(cluster=str(tmp_path / "c.yaml"))
    assert line.startswith(str(tmp_path / "c.yaml"))


def test_a_directory_of_ones_own(tmp_path):
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "mine.yaml").write_text("gpus_per_node: 8\ntime_limit: '01:00:00'\n")
    name, cluster = load_cluster(["cluster=mine"], tmp_path)
    assert (name, cluster.ranks_per_node) == ("mine", 8)
    assert set(cluster_options(tmp_path)) == {"mine", *cluster_options()}


def test_the_template_has_every_key_with_its_default():
    plain = yaml.safe_load((CLUSTERS / "template.yaml").read_text())
    defaults = to_plain(ClusterConfig())
    assert plain == defaults
    lines = (CLUSTERS / "template.yaml").read_text().splitlines()
    for key in flatten(defaults):
        leaf = key.rpartition(".")[2]
        assert any(re.match(rf"\s*{leaf}:", line) for line in lines), key


@pytest.mark.parametrize("file", sorted(CLUSTERS.glob("*.yaml")), ids=lambda f: f.stem)
def test_every_file_is_a_cluster_but_for_what_only_the_user_knows(file):
    text = file.read_text()
    assert text.startswith("# ") and max(map(len, text.splitlines())) <= 120
    given = {
        "partition": "x", "account": "x", "venv": "/v", "time_limit": "01:00:00", "gpus_per_node": "8",
        "container.image": "/x.sqsh", "container.mounts": "[/x:/x]",
    }  # fmt: skip
    plain = flatten(yaml.safe_load(text))
    load_cluster([f"cluster={file.stem}", *(f"cluster.{k}={given[k]}" for k, v in plain.items() if v == TO_BE_GIVEN)])


def test_every_governing_key_exists():
    keys = set(schema_keys(ClusterFile))
    assert {f"cluster.{key}" for key in MANAGED.values() if key} <= keys
