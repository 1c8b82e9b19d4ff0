"""R17: whatever is wrong with a configuration is told in one line that names the key, before anything has begun."""

from __future__ import annotations

import random
import time
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from hymba_train.cli import USER_ERROR, main
from hymba_train.config import compose, to_yaml
from hymba_train.config.schema import Config
from hymba_train.config.typed import field_types, flatten, to_plain

pytestmark = pytest.mark.reliability
MOST_SECONDS = 10
BASE = ["experiment=demo"]
_TIMES_NINE = "{1}: &{1} [*{0},*{0},*{0},*{0},*{0},*{0},*{0},*{0},*{0}]\n"
BOMB = "a: &a [x]\n" + "".join(_TIMES_NINE.format(*pair) for pair in ("ab", "bc", "cd", "de", "ef", "fg", "gh", "hi"))
# Values that no key of a kind may have. Zero and minus one mean something for keys that are not in COUNTS.
WRONG = {
    int: ("abc", "1.5", "[1]", "null", "true", "{a: 1}", ".inf"),
    float: ("abc", "[0.1]", "null", "false", ".nan", "-.inf", "{a: 1}"),
    bool: ("maybe", "3", "[true]", "null"),
    str: ("[a]", "{a: b}", "null"),
}
COUNTS = (
    "model.num_layers", "model.hidden_size", "model.ffn_hidden_size", "model.num_attention_heads",
    "model.num_query_groups", "model.vocab_size", "model.mamba_expand", "model.mamba_state_dim",
    "model.mamba_conv_width",
    "parallel.tensor", "parallel.pipeline", "parallel.virtual_pipeline", "data.phases.stable.tokens",
    "data.phases.stable.seq_length", "data.phases.stable.global_batch_size", "data.phases.stable.micro_batch_size",
)  # fmt: skip
CHOICES = (
    "precision.params", "precision.fp8", "optim.name", "schedule.lr_decay_style", "run.device", "model.rope_type",
    "model.init_method", "parallel.recompute", "data.phases.stable.packing",
)  # fmt: skip
OTHERS = (
    ("model=hymba_9b", "model"),
    ("experiment=demmo", "experiment"),
    ("optim.lr", "optim.lr"),
    ("optim.lr=[", "optim.lr"),
    ("run.name=${no.such}", "no.such"),
    ("optim.lr=1,2", "optim.lr"),
    ("~data.phases.nope", "data.phases.nope"),
    ("+evil._target_=os.system", "evil"),
    ("model._target_=os.system", "_target_"),
    ("data.phases.x._target_=a", "_target_"),
    ("hydra.run.dir=/tmp/x", "hydra"),
    ("run.name=${run.name}", "run.name"),
    ("run.name=../../etc", "run.name"),
    ("model.num_attention_heads=7", "model.num_attention_heads"),
    ("parallel.tensor=64", "parallel.tensor"),
    ("parallel.world_size=3", "parallel.world_size"),
    ("model.kv_groups=[[1,1]]", "kv_groups"),
    ("model.global_layers=[99]", "global_layers"),
    ("data.phases.stable.blend={nope: 1}", "blend"),
    ("data.sources.a.path='s3://user:hunter2@host/a'", "data.sources.a.path"),
    ("run.name='${oc.env:HF_TOKEN}'", "run.name"),
    ("data.phases.stable.rampup_batch_size=[1]", "rampup_batch_size"),
    ("model.layer_pattern=[mamba]", "layer_pattern"),
    ("parallel.pipeline_layout=[1]", "pipeline_layout"),
    ("schedule.lr_warmup_fraction=2", "lr_warmup_fraction"),
    ("optim.lr=-1", "optim.lr"),
    ("optim.adam_beta1=1.5", "adam_beta1"),
    ("data.sources.s.validation_fraction=1.5", "validation"),
)  # fmt: skip


def kinds() -> dict[str, type]:
    """Dotted key of the base -> int, float, bool or str, for keys that are one of them and never null."""
    found = {}

    def walk(cls, prefix, plain):
        for name, annotation in field_types(cls).items():
            key = f"{prefix}{name}"
            if is_dataclass(annotation):
                walk(annotation, f"{key}.", plain[name])
            elif annotation in WRONG:
                found[key] = annotation
            elif typing.get_origin(annotation) is dict and hasattr(
                typing.get_args(annotation)[1], "__dataclass_fields__"
            ):
                for entry, value in plain[name].items():
                    walk(typing.get_args(annotation)[1], f"{key}.{entry}.", value)

    walk(Config, "", to_plain(compose(BASE)))
    return found


def misspelt(key: str, rng: random.Random) -> str:
    head, _, leaf = key.rpartition(".")
    at = rng.randrange(1, len(leaf))
    changed = rng.choice([leaf[:at] + leaf[at + 1 :], leaf[:at] + "x" + leaf[at:], leaf + "s", leaf.upper()])
    return f"{head}.{changed}" if head else changed


def broken_overrides(rng: random.Random) -> Iterator[tuple[str, str]]:
    """(override, what the answer must name), for ever."""
    by_key = kinds()
    every = list(flatten(to_plain(compose(BASE))))
    while True:
        kind = rng.randrange(5)
        if kind == 0:
            key = misspelt(rng.choice(every), rng)
            if key not in every:
                yield f"{key}=1", key.rpartition(".")[2]
        elif kind == 1:
            key = rng.choice(list(by_key))
            yield f"{key}={rng.choice(WRONG[by_key[key]])}", key
        elif kind == 2:
            key = rng.choice(COUNTS)
            yield f"{key}={rng.choice([0, -1, -7])}", key
        elif kind == 3:
            key = rng.choice(CHOICES)
            yield f"{key}=nonesuch", key
        else:
            yield rng.choice(OTHERS)


def broken_files(path: Path, rng: random.Random) -> Iterator[tuple[Path, str]]:
    """(frozen file, what the answer must name)."""
    good = to_yaml(compose(BASE))
    contents = {
        "empty": "", "cut": good[: len(good) // 2] + "\n  [", "list": "- 1\n", "number": "3", "binary": "\x00\xff",
        "tag": "model: !!python/object/apply:os.system ['true']\n", "colon": "a: b: c",
        "tabs": good.replace("  ", "\t"), "twice": "model: {name: a}\nmodels: {}\n", "key": "1: 2\n",
        "link": "model: *nowhere\n", "bomb": BOMB,
        "deep": "a: " + "[" * 3000,
    }  # fmt: skip
    for name, content in contents.items():
        file = path / f"{name}.yaml"
        file.write_bytes(content.encode("latin-1"))
        yield file, name
    lines = good.splitlines()
    for number in range(20):
        damaged = list(lines)
        at = rng.randrange(1, len(damaged))
        damaged[at] = damaged[at].replace(":", "_x:", 1) if rng.random() < 0.5 else damaged[at] + " }"
        file = path / f"line{number}.yaml"
        file.write_text("\n".join(damaged))
        yield file, ""


def answer(arguments: list[str], names: str, capsys, place: Path) -> str | None:
    """What is wrong with the answer to a broken configuration; None if nothing."""
    begin = time.monotonic()
    code = main(["train", *arguments])
    seconds = time.monotonic() - begin
    out, err = capsys.readouterr()
    lines = err.splitlines()
    if code != USER_ERROR:
        return f"exit code {code}"
    if not lines or not all(line.startswith("hymba: error: ") for line in lines) or "Traceback" in out + err:
        return f"not a line a problem: {err!r}"
    if not any(names in line for line in lines):
        return f"names no {names}: {err!r}"
    if "hunter2" in out + err:
        return "repeats a password"
    return f"took {seconds:.1f} s" if seconds > MOST_SECONDS else None


def fuzz(count: int, seed: int, tmp_path: Path, capsys) -> None:
    rng = random.Random(seed)
    place = [f"run.directory={tmp_path / 'runs'}", "run.name=fuzz"]
    tried, wrong = 0, []
    for file, names in broken_files(tmp_path, rng):
        tried += 1
        if found := answer(["--frozen", str(file)], names, capsys, tmp_path):
            wrong.append((file.name, found))
    for override, names in broken_overrides(rng):
        if tried >= count:
            break
        tried += 1
        if found := answer([*BASE, *place, override], names, capsys, tmp_path):
            wrong.append((override, found))
    assert not wrong, "\n".join(map(str, wrong))
    assert not (tmp_path / "runs").exists()


def test_broken_configurations(tmp_path, capsys):
    fuzz(80, 17, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_three_hundred_broken_configurations(tmp_path, capsys, seed):
    fuzz(300, seed, tmp_path, capsys)


def test_the_base_itself_is_whole(tmp_path, capsys, monkeypatch):
    """Control: without a mutation there is nothing to tell, so the answers above are about the mutations."""
    assert main(["plan", *BASE, "--skip-paths"]) == 0
