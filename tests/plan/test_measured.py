"""Step time and days from a table of measured speeds."""

from __future__ import annotations

import dataclasses
import io

import pytest
import yaml

from hymba_train.config import compose
from hymba_train.errors import UserError
from hymba_train.plan import make_plan
from hymba_train.plan.measured import TABLE, Row, estimate_times, measured_rows
from hymba_train.plan.render import plan_to_json, print_plan
from hymba_train.plan.suggest import suggest

ROW = Row("H200", "hymba_1p5b", "bf16", 2048, 8, 1, "none", 40_000.0, 100.0, "0123abc", "2026-11-24")
LONG = dataclasses.replace(ROW, seq_length=8192, micro_batch_size=2, tokens_per_second=30_000.0)
BIG = ["experiment=pretrain_1p5b"]


def plan_of(*overrides, world_size=None):
    return make_plan(compose([*BIG, *overrides]), world_size, check_paths=False)


def test_days_of_the_published_recipe_by_hand():
    (estimate,) = estimate_times(plan_of(), "NVIDIA H200", [ROW, LONG])
    stable, anneal, long = estimate.phases
    assert stable.step_seconds == anneal.step_seconds == pytest.approx(1024 * 2048 / (128 * 40_000))
    assert long.step_seconds == pytest.approx(256 * 8192 / (128 * 30_000))
    seconds = (476_837 + 190_734) * stable.step_seconds + 47_683 * long.step_seconds
    assert estimate.days == pytest.approx(seconds / 86_400)


@pytest.mark.parametrize(
    "change",
    [
        {"gpu": "H100"}, {"model": "hymba_350m"}, {"precision": "fp8-delayed"}, {"seq_length": 4096},
        {"micro_batch_size": 4}, {"tensor": 2}, {"recompute": "full"},
    ],
)  # fmt: skip
def test_nothing_is_taken_from_another_setting(change):
    (estimate,) = estimate_times(plan_of(), "H200", [dataclasses.replace(ROW, **change), LONG])
    assert [phase.step_seconds is None for phase in estimate.phases] == [True, True, False]
    assert estimate.days is None and estimate.phases[0].row is None


def test_a_name_is_found_as_whole_words():
    assert ROW.is_of("NVIDIA H200") and ROW.is_of("h200") and not ROW.is_of("NVIDIA GH200 480GB")
    assert dataclasses.replace(ROW, gpu="H100 80GB HBM3").is_of("NVIDIA H100 80GB HBM3")
    assert not dataclasses.replace(ROW, gpu="H100 PCIe").is_of("NVIDIA H100 80GB HBM3")


def test_the_newest_row_counts():
    newer = dataclasses.replace(ROW, tokens_per_second=44_000.0, date="2026-12-01")
    (estimate,) = estimate_times(plan_of(), "H200", [newer, ROW])
    assert estimate.phases[0].row is newer


def test_pipelines_wait_for_bubble_and_busiest_stage():
    plan = plan_of("parallel=single", "parallel.pipeline=4", "parallel.world_size=null", world_size=16)
    (estimate,) = estimate_times(plan, "H200", [ROW])
    even = 1024 * 2048 / (16 * 40_000)
    assert estimate.phases[0].step_seconds == pytest.approx(even * plan.balance * (32 + 3) / 32)


def test_fp8_rows_are_named_after_the_recipe():
    fp8 = dataclasses.replace(ROW, precision="fp8-tensorwise")
    plan = plan_of("precision=fp8", "precision.fp8=tensorwise")
    assert estimate_times(plan, "H200", [fp8])[0].phases[0].row is fp8


def test_what_is_printed(monkeypatch):
    rows = (ROW, LONG, dataclasses.replace(ROW, gpu="H100"))
    monkeypatch.setattr("hymba_train.plan.measured.measured_rows", lambda: rows)
    text = printed(plan_of())
    assert "time on H200: stable 0.41 s a step, anneal 0.41 s a step, long 0.546 s a step; 3.47 days in all" in text
    assert "from 40,000 tokens/s a GPU, measured 2026-11-24 at commit 0123abc" in text
    assert "time on H100: stable 0.41 s a step, anneal 0.41 s a step, long not measured\n" in text
    alone = printed(plan_of(), gpu="B200")
    assert "time on B200: stable not measured, anneal not measured, long not measured\n" in alone
    assert "H200" not in alone
    data = plan_to_json(plan_of(), "H200")["time"]
    assert data[0]["days"] == pytest.approx(3.47, abs=0.01) and data[0]["phases"][0]["row"]["commit"] == "0123abc"
    best = suggest(compose(BIG), 128, 1000.0, gpu="H200")[0]
    assert (best.tensor, best.pipeline, best.recompute) == (1, 1, "none")
    assert best.days == pytest.approx(3.47, abs=0.01)


def test_without_rows_nothing_is_claimed(monkeypatch):
    monkeypatch.setattr("hymba_train.plan.measured.measured_rows", lambda: ())
    assert "time on any GPU: stable not measured" in printed(plan_of())


def printed(plan, **keywords) -> str:
    file = io.StringIO()
    print_plan(plan, file, **keywords)
    return file.getvalue()


def test_the_table_that_is_shipped_is_as_its_head_says():
    head = TABLE.read_text()
    measured_rows()
    for field in dataclasses.fields(Row):
        assert f"#   {field.name} " in head


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tokens_per_second": 0}, "must be above 0"),
        ({"date": "yesterday"}, "Invalid isoformat"),
        ({"commit": "the last one"}, "is no commit"),
        ({"speed": 1}, "wants"),
    ],
)
def test_broken_rows_are_refused(change, problem, tmp_path):
    path = tmp_path / "measured.yaml"
    path.write_text(yaml.safe_dump({"rows": [dataclasses.asdict(ROW), {**dataclasses.asdict(ROW), **change}]}))
    with pytest.raises(UserError, match=rf"measured.yaml: row 1: .*{problem}"):
        measured_rows(path)
