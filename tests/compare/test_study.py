"""What a comparison checks before it starts, and what it makes of results."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics

import pytest

from hymba_train.compare.members import SETS, Budget, choose_members, parse_budget
from hymba_train.compare.plots import draw_all
from hymba_train.compare.report import as_json, table_lines
from hymba_train.compare.results import MemberResult, Point, RunResult, check_data, differences, mean_and_spread
from hymba_train.compare.study import flops_at, make_study, num_parameters
from hymba_train.describe import training_flops
from hymba_train.errors import UserError
from tests.compare.conftest import arguments

TWO = ["attention=model.layer_pattern=[attention]", "ssm=model.layer_pattern=[ssm]"]


def study_of(path, *members: str, budget: str | None = None, any_size=True, num_seeds=2, overrides=()):
    _, experiment, _, config_dir, _ = arguments(path)
    return make_study(
        choose_members("custom", None, "20m", members or TWO), [experiment, "run.name=study", *overrides],
        num_seeds=num_seeds, budget=parse_budget(budget) if budget else None, config_dir=config_dir, any_size=any_size,
    )  # fmt: skip


def test_runs_are_named_seeded_and_in_the_order_of_the_seeds(study_dir):
    study = study_of(study_dir, overrides=["run.seed=40"])
    assert [run.name for run in study.runs] == ["attention-seed1", "ssm-seed1", "attention-seed2", "ssm-seed2"]
    assert [run.config.run.seed for run in study.runs] == [40, 40, 41, 41]
    assert all(run.directory == study_dir / "runs" / "study" / run.name for run in study.runs)
    assert all(run.config.logging.batch_hash for run in study.runs)
    first, second, *_ = (dataclasses.asdict(run.config) for run in study.runs)
    assert {group for group in first if first[group] != second[group]} == {"model", "run"}


@pytest.mark.parametrize(
    "text, amount, in_flops", [("10M", 1e7, False), ("2e6", 2e6, False), ("1.5e9flops", 1.5e9, True)]
)
def test_budgets(study_dir, text, amount, in_flops):
    assert parse_budget(text) == Budget(amount, in_flops)
    study = study_of(study_dir, budget=text)
    for member in study.members:
        config = study.config(member)
        (phase,) = config.data.phases.values()
        step = phase.seq_length * phase.global_batch_size
        assert phase.tokens % step == 0
        spent = training_flops(config.model, phase.seq_length) * phase.tokens if in_flops else phase.tokens
        one_step = spent / phase.tokens * step
        assert abs(spent - amount) <= one_step / 2 * 1.001
        assert flops_at(config, phase.tokens) == training_flops(config.model, phase.seq_length) * phase.tokens


@pytest.mark.parametrize("text", ["", "10 apples", "-3M", "0", "10Mflop"])
def test_budgets_that_are_none(text):
    with pytest.raises(UserError, match="budget="):
        parse_budget(text)


@pytest.mark.parametrize(
    "members, problem",
    [
        ((TWO[0], "slow=schedule.lr_decay_style=constant"), "lr_decay_style: attention has cosine, slow has con"),
        ((TWO[0], "other='data.phases.only.blend={odd:1}'"), "only.blend.odd: attention has 0.5, other has 1.0"),
        ((TWO[0], "seeded=run.seed=7"), "run.seed: differs between members"),
        ((TWO[0], "bad=optim.lrr=1"), "bad: optim.lrr: unknown key"),
        ((TWO[0],), "a comparison needs two members"),
        ((TWO[0], TWO[0]), "attention is named twice"),
        ((TWO[0], "a/b=optim.lr=1"), "a name holds letters"),
        ((TWO[0], "nothing"), "write NAME='OVERRIDES'"),
    ],
)  # fmt: skip
def test_what_would_compare_more_than_models_is_refused(study_dir, members, problem):
    with pytest.raises(UserError, match=problem.replace("[", r"\[")):
        study_of(study_dir, *members)


def test_sizes_within_three_percent(study_dir):
    with pytest.raises(UserError, match=r"ssm has \d+\.\d% more than attention, 3% is the most \(attention "):
        study_of(study_dir, any_size=False)
    near = [TWO[0], "near=model.layer_pattern=[attention] model.ffn_hidden_size=50"]
    study = study_of(study_dir, *near, any_size=False)
    small, large = (num_parameters(study.config(name)) for name in study.members)
    assert 1 < large / small < 1.03


def test_sets_and_rows():
    assert [m.overrides for m in choose_members("roadmap", None, "20m", [])][:2] == [
        ("model=transformer_20m",), ("model=mamba_20m",)
    ]  # fmt: skip
    assert [m.name for m in choose_members("baselines", "samba,hymba", "1b", ["x=a=1"])] == ["samba", "hymba", "x"]
    assert len(SETS["roadmap"]) == len(SETS["baselines"]) == 7
    with pytest.raises(UserError, match="did you mean roadmap"):
        choose_members("roadmp", None, "20m", [])


def result(member: str, recall: list[float], losses: list[float], cache: int = 1000, hashes="abc") -> MemberResult:
    """A member with as many finished seeds as there are values."""
    runs = tuple(
        RunResult(
            member, seed, "finished",
            tuple(Point(i + 1, 10 * i, 1e3 * i, 0.1 * i, 5.0 - i / 9, f"{seed}{h}") for i, h in enumerate(hashes)),
            100.0, {"odd": b}, {"pairs": a, "needle": a}, {"pairs": 1.0, "needle": 1.0},
        )
        for seed, (a, b) in enumerate(zip(recall, losses, strict=True), 1)
    )  # fmt: skip
    return MemberResult(member, 1000, cache, 30, 1e6, runs)


def test_differences_are_paired_by_seed():
    """The seeds scatter by 0.1, the pairs differ by 0.02 each: resolved, though the spread of either is larger."""
    a, b = result("a", [0.3, 0.4, 0.5], [3.0, 3.1, 2.9]), result("b", [0.32, 0.42, 0.521], [2.5, 3.3, 3.2])
    recall, held_out = differences([a, b])
    assert recall.mean == pytest.approx(0.0203, abs=1e-4) and recall.num_seeds == 3 and recall.is_resolved
    deltas = [0.02, 0.02, 0.021]
    assert recall.half_width == pytest.approx(4.303 * statistics.stdev(deltas) / math.sqrt(3), rel=1e-6)
    assert not held_out.is_resolved and held_out.mean == pytest.approx(0.0)
    (single, _) = differences([result("a", [0.1], [1.0]), result("b", [0.9], [1.0])])
    assert single.half_width is None and not single.is_resolved
    three = differences([a, b, result("c", [0.5] * 3, [3.0] * 3)])
    assert [(d.reference, d.other) for d in three[:3]] == [("a", "b"), ("a", "c"), ("b", "c")]


@pytest.mark.parametrize(
    "seeds, quantile", [(2, 12.706), (5, 2.776), (10, 2.262), (11, 2.228), (13, 2.179), (20, 2.093), (61, 2.000)]
)
def test_intervals_are_those_of_students_t_for_any_number_of_seeds(seeds, quantile):
    a, b = result("a", [0.0] * seeds, [1.0] * seeds), result("b", ([0.1, 0.3] * seeds)[:seeds], [1.0] * seeds)
    recall, _ = differences([a, b])
    deltas = ([0.1, 0.3] * seeds)[:seeds]
    assert recall.half_width == pytest.approx(quantile * statistics.stdev(deltas) / math.sqrt(seeds), abs=1e-4)


def test_other_batches_are_found():
    same, other = result("a", [0.1, 0.2], [1, 1]), result("b", [0.1, 0.2], [1, 1], hashes="abx")
    assert check_data([same, result("b", [0.1, 0.2], [1, 1])]).num_compared == 6
    found = check_data([same, other])
    assert found.problems == tuple(f"seed {s}: a and b trained on different batches in step 3" for s in (1, 2))


def test_mean_and_spread():
    assert mean_and_spread([]) is None and mean_and_spread([2.0]) == (2.0, 0.0)
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))


def test_a_table_without_results_and_one_with_a_nan(study_dir, tmp_path):
    study = study_of(study_dir)
    nothing = [
        MemberResult(name, 10, 10, 10, 1e3, (RunResult(name, 1, "not started", (), None, {}, {}, {}),)) for name in "ab"
    ]
    lines = table_lines(study, nothing, differences(nothing), check_data(nothing), 1)
    assert "0 of 4 runs finished" in "\n".join(lines) and "- a seed 1: not started" in lines
    assert draw_all(tmp_path, nothing, "t") == []
    diverged = [result("a", [0.1], [math.nan]), result("b", [0.1], [1.0])]
    data = as_json(study, diverged, differences(diverged), check_data(diverged))
    assert json.loads(json.dumps(data, allow_nan=False))["members"][0]["runs"][0]["held_out"] == {"odd": None}
    assert len(draw_all(tmp_path, diverged, "t")) == 5


def test_a_finished_run_whose_log_lacks_its_scores_is_named(study_dir):
    study = study_of(study_dir)
    a, b = result("a", [0.1, 0.3], [1.0, 1.0]), result("b", [0.1, 0.5], [1.0, 1.0])
    lost = dataclasses.replace(b, runs=(b.runs[0], dataclasses.replace(b.runs[1], recall={}, recall_loss={})))
    members = [a, lost]
    lines = table_lines(study, members, differences(members), check_data(members), 1)
    assert "- b seed 2: finished, but its metrics.jsonl has no recall: not in those means" in lines
    assert "| b | 10.0% | 10.0% |" in lines and not any("a seed" in line for line in lines)


def test_a_slurm_array_takes_the_runs_that_are_left(study_dir, monkeypatch, tmp_path, capsys):
    """One array, a task a run; what has finished is not among them."""
    from hymba_train.outcome import write_outcome
    from launch import slurm
    from launch.study import submit_study

    study = study_of(study_dir, overrides=["run.name=array"])
    done = study.runs[0].directory
    done.mkdir(parents=True)
    write_outcome(done, "finished", 16, "all phases trained")
    seen = []
    monkeypatch.setattr(slurm, "submit", lambda job, points: seen.append((job, points)) or 0)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: "/bin/true")
    assert submit_study(study, ["cluster=local_test", "cluster.processes_per_node=1", "cluster.nodes=1"], None) == 0
    ((job, points),) = seen
    assert job.is_sweep and [p.config.run.name for p in points] == ["ssm-seed1", "attention-seed2", "ssm-seed2"]
    assert list(job.run_directories) == [p.directory for p in points] and job.name == "array"
