"""``hymba launch slurm`` with stand-ins for sbatch and squeue: what is written, submitted, refused."""

from __future__ import annotations

import json
import os

import pytest

from hymba_train.cli import main
from hymba_train.config import load_frozen

SBATCH = """#!/bin/bash
echo "$*" >> "$CALLS"
[[ -n ${SBATCH_SAYS:-} ]] && { echo "$SBATCH_SAYS" >&2; exit 1; }
[[ $1 == --test-only ]] && { echo "sbatch: Job 9 to start at noon" >&2; cp "$2" "$CALLS.script"; exit 0; }
echo $((100 + $(wc -l < "$CALLS")))
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working directory with the demo's (empty) data; sbatch notes its calls in ``calls``."""
    (tmp_path / "data" / "tokenizer").mkdir(parents=True)
    (tmp_path / "data" / "tokenizer" / "tokenizer.json").touch()
    for source in ("books", "speeches", "docs", "code"):
        for suffix in ("bin", "idx"):
            (tmp_path / "data" / f"{source}.{suffix}").touch()
    (tmp_path / "bin").mkdir()
    for name, text in (
        ("sbatch", SBATCH),
        ("squeue", '#!/bin/bash\n[[ -n ${LIVE:-} ]] && echo "$3 $LIVE" || exit 1\n'),
    ):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(*arguments: str) -> int:
    base = ["launch", "slurm", "experiment=demo", "data.path=data", "cluster=local_test", "cluster.nodes=1"]
    return main([*base, "cluster.processes_per_node=1", *arguments])


def calls(work) -> list[str]:
    return (work / "calls").read_text().splitlines() if (work / "calls").exists() else []


def test_a_run_is_frozen_written_and_submitted(work, capsys):
    assert launch("optim.lr=1e-3") == 0
    run, out = work / "runs" / "demo", capsys.readouterr().out
    assert load_frozen(run / "resolved.yaml").optim.lr == 1e-3
    script = run / "slurm" / "0001" / "job.sh"
    assert calls(work) == [f"--parsable {script}"] and f"#SBATCH --chdir={work}\n" in script.read_text()
    facts = json.loads((run / "slurm" / "0001" / "launch.json").read_text())
    assert facts["jobs"] == ["101"] and "optim.lr=1e-3" in facts["command"]
    assert out.startswith("job 101: demo on cluster local_test, nodes 1 x 1 ranks\n")
    assert f"tail -F {run}/slurm/0001/job-101.log" in out and "scancel 101" in out


def test_a_second_launch_has_a_directory_of_its_own(work, capsys):
    assert launch() == launch("logging.log_interval=3") == 0
    assert sorted(p.name for p in (work / "runs" / "demo" / "slurm").iterdir()) == ["0001", "0002"]
    assert "demo: changed since the last start: logging.log_interval: " in capsys.readouterr().err


def test_a_dry_run_writes_nothing(work, capsys):
    assert launch("--dry-run") == 0
    out, err = capsys.readouterr()
    assert out.startswith("#!/bin/bash\n") and "--test-only: sbatch: Job 9 to start at noon" in err
    assert out == (work / "calls.script").read_text()  # what Slurm was asked about is what was printed
    assert not (work / "runs").exists()


def test_a_dry_run_far_from_cluster_and_data(work, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert launch("--dry-run", "--skip-paths", "data.path=/data") == 0
    assert "Slurm has not checked this script" in capsys.readouterr().err
    assert launch("--dry-run", "data.path=/data") == 2
    assert launch("--skip-paths") == 2 and "only with --dry-run" in capsys.readouterr().err
    assert launch() == 2 and "sbatch: not found" in capsys.readouterr().err


def test_what_slurm_refuses_is_said(work, capsys, monkeypatch):
    monkeypatch.setenv("SBATCH_SAYS", "sbatch: error: invalid partition specified: gold")
    assert launch("--dry-run") == 2
    assert "invalid partition specified: gold" in capsys.readouterr().err
    assert launch() == 2
    assert "invalid partition specified: gold; the script is " in capsys.readouterr().err


def test_a_chain_is_submitted_link_by_link(work):
    assert launch("cluster.restart.chain=3", "cluster.restart.max_requeues=0") == 0
    after = [call.split(" /")[0] for call in calls(work)]
    assert after == [
        "--parsable",
        "--parsable --dependency=afternotok:101 --kill-on-invalid-dep=yes",
        "--parsable --dependency=afternotok:102 --kill-on-invalid-dep=yes",
    ]


def test_a_sweep_is_frozen_point_by_point_and_submitted_once(work, capsys):
    assert launch("--sweep", "optim.lr=1e-3,2e-3") == 0
    for lr in (0.001, 0.002):
        run = work / "runs" / f"demo-lr={lr}"
        assert load_frozen(run / "resolved.yaml").optim.lr == lr
        assert json.loads((run / "slurm" / "0001" / "launch.json").read_text())["jobs"] == ["101"]
    assert calls(work) == [f"--parsable {work}/runs/demo.sweep/0001/job.sh"]
    assert "a sweep of 2 on cluster" in capsys.readouterr().out
    assert launch("--sweep", "optim.lr=1e-3,2e-3", "cluster.restart.chain=2", "cluster.restart.max_requeues=0") == 2


def test_one_bad_point_stops_the_whole_sweep(work, capsys):
    assert launch("--sweep", "optim.lr=1e-3,fast") == 2
    assert "[optim.lr=fast] optim.lr: expected float" in capsys.readouterr().err
    assert not (work / "runs").exists() and not calls(work)


def test_a_live_job_keeps_others_out(work, capsys, monkeypatch):
    assert launch() == 0
    monkeypatch.setenv("LIVE", "RUNNING")
    assert launch() == 2
    assert "job 101 of this run is RUNNING; wait for it, scancel 101" in capsys.readouterr().err
    assert len(calls(work)) == 1
    (work / "runs" / "demo" / "slurm" / "0001" / "launch.json").write_text("{")
    assert launch() == 0


def test_a_container_must_see_what_the_run_needs(work, capsys):
    image = "cluster.container.image=site#hymba"
    assert launch(image, f"cluster.container.mounts=[{work}/runs:{work}/runs,{work}/data:/data]") == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "working directory" in line and f"add {work}:{work}" in line]
    assert [line for line in lines if "data.path" in line] and not [line for line in lines if "run.directory" in line]
    assert launch(image, f"cluster.container.mounts=[{work}:{work}]") == 0
    assert launch("cluster.container.image=/no/such.sqsh", f"cluster.container.mounts=[{work}:{work}]") == 2


def test_other_mistakes(work, capsys):
    for arguments, expected in (
        (["--nodes", "0"], "--nodes 0: give at least 1"),
        (["cluster.venv=/no/such"], "cluster.venv=/no/such: no bin/activate there"),
        (["--no-such"], "hymba launch slurm: unrecognized arguments: --no-such"),
        (["--dry"], "unrecognized arguments"),
    ):
        assert launch(*arguments) == 2
        assert expected in capsys.readouterr().err
    assert main(["launch", "slrum"]) == 2 and "did you mean slurm?" in capsys.readouterr().err
    assert main(["launch"]) == 2 and main(["launch", "--help"]) == 0
    assert main(["launch", "slurm", "experiment=demo"]) == 2
    assert "cluster: not chosen" in capsys.readouterr().err
    assert main(["train", "experiment=demo", "cluster=local_test"]) == 2
    assert "clusters belong to hymba launch slurm" in capsys.readouterr().err
