"""The command line: exit codes, one line an error, verbs, torchrun."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hymba_train import cli
from hymba_train.cli import main
from hymba_train.config import compose, load_frozen
from hymba_train.errors import UserError
from hymba_train.train.cli import SECONDS_FOR_FIRST_RANK

ROOT = Path(__file__).parent.parent


@pytest.fixture
def demo_data(tmp_path):
    """A directory with the files that experiment=demo names; empty, for plan only looks whether they are there."""
    directory = tmp_path / "demo-data"
    (directory / "tokenizer").mkdir(parents=True)
    (directory / "tokenizer" / "tokenizer.json").touch()
    for source in ("books", "speeches", "docs", "code"):
        (directory / f"{source}.bin").touch()
        (directory / f"{source}.idx").touch()
    return directory


@pytest.fixture
def demo(demo_data, tmp_path):
    return ["experiment=demo", f"data.path={demo_data}", f"run.directory={tmp_path / 'runs'}"]


@pytest.fixture
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def trained(monkeypatch):
    """Stands in for the trainer, which needs torch: records what it is called with."""
    calls = []
    module = type(sys)("hymba_train.train.main")
    module.train = lambda config, plan: calls.append((config, plan)) or 0
    monkeypatch.setitem(sys.modules, "hymba_train.train.main", module)
    return calls


# override, key that the line names, fix that the line names
BROKEN = [
    ("experiment=dmo", "experiment=dmo", "did you mean demo?"),
    ("model=hymba_1.5b", "model=hymba_1.5b", "did you mean hymba_1p5b?"),
    ("paralel=dp", "paralel", "did you mean parallel?"),
    ("lr=1e-3", "lr", "did you mean optim.lr?"),
    ("model.hiden_size=64", "model.hiden_size", "did you mean model.hidden_size?"),
    ("data.phases.stable.seqlength=1", "data.phases.stable.seqlength", "did you mean data.phases.stable.seq_length?"),
    ("model.num_layers=four", "model.num_layers", "expected int"),
    ("optim.lr=fast", "optim.lr", "expected float"),
    ("parallel.sequence=1", "parallel.sequence", "expected bool"),
    ("run.name=7", "run.name", "expected text"),
    ("optim.lr=nan", "optim.lr", "must be finite"),
    ("optim.lr=1e-3,1e-4", "optim.lr", "choose one"),
    ("optim.lr", "optim.lr", "write KEY=VALUE"),
    ("model._target_=os.system", "model._target_", "refused"),
    ("hydra.run.dir=x", "hydra.run.dir", "leave it out"),
    ("~model", "~model", "choose one of"),
    ("~data.phases.lng", "~data.phases.lng", "no such key"),
    ("run.name=${run.nme}", "run.name", "did you mean run.name?"),
    ("model.num_attention_heads=6", "model.num_attention_heads", "nearest are 4 and 8"),
    ("model.num_query_groups=3", "model.num_query_groups", "nearest are 2 and 4"),
    ("model.num_attention_heads=128", "model.num_attention_heads", "even width"),
    ("model.kv_groups=[[2,3]]", "model.kv_groups", "must see alike"),
    ("model.global_layers=[0,99]", "model.global_layers", "layers are 0..7"),
    ("model.layer_pattern=[hybird]", "model.layer_pattern", "hybrid"),
    ("model.rope_type=yarn", "model.rope_type", "default, ntk"),
    ("model.hidden_size=0", "model.hidden_size", "at least 1"),
    ("model.hidden_size=???", "model.hidden_size", "to be given"),
    ("parallel.tensor=8", "parallel.tensor", "at most 4"),
    ("parallel.context=2", "parallel.context", "set it to 1"),
    ("parallel.sequence=true", "parallel.sequence", "parallel.tensor of at least 2"),
    ("parallel.virtual_pipeline=2", "parallel.virtual_pipeline", "parallel.pipeline of at least 2"),
    ("parallel.pipeline=9", "parallel.pipeline", "8 at most"),
    ("parallel.pipeline_layout=[7]", "parallel.pipeline_layout", "add 1"),
    ("parallel.pipeline_layout=[4,4]", "parallel.pipeline_layout", "give 1 or null"),
    ("parallel.distributed_optimizer=false", "parallel.overlap_param_gather", "parallel.distributed_optimizer=true"),
    ("parallel.overlap_grad_reduce=false", "parallel.overlap_param_gather", "parallel.overlap_grad_reduce=true"),
    ("parallel.recompute=selective", "parallel.recompute", "none, full"),
    ("precision.fp8=delayed", "precision.fp8", "precision.params=bf16"),
    ("precision.params=fp16", "precision.params", "did you mean bf16?"),
    ("optim.name=muon", "optim.name", "adamw"),
    ("optim.min_lr=1", "optim.min_lr", "at most optim.lr"),
    ("optim.adam_beta1=1", "optim.adam_beta1", "below 1"),
    ("schedule.lr_decay_style=wds", "schedule.lr_decay_style", "did you mean wsd?"),
    ("schedule.lr_wsd_decay_fraction=0.99", "schedule.lr_wsd_decay_fraction", "lower one by 0.04"),
    ("schedule.lr_warmup_fraction=2", "schedule.lr_warmup_fraction", "0..1"),
    ("data.phases.stable.global_batch_size=9", "data.phases.stable.global_batch_size", "nearest are 8 and 10"),
    ("data.phases.stable.rampup_batch_size=[2,4,1000]", "data.phases.stable.rampup_batch_size", "nearest are 3 and 6"),
    ("data.phases.stable.rampup_batch_size=[2]", "data.phases.stable.rampup_batch_size", "[start, increment, tokens]"),
    ("data.phases.stable.seq_length=512", "data.phases.stable.seq_length", "data.phases.stable.rope_type=ntk"),
    ("data.phases.stable.tokens=100", "data.phases.stable.tokens", "make the phase longer"),
    ("data.phases.stable.blend={boks: 1.0}", "data.phases.stable.blend.boks", "did you mean books?"),
    ("data.phases.stable.blend.books=0", "data.phases.stable.blend.books", "above 0"),
    ("data.phases.new={tokens: 4096, seq_length: 256, global_batch_size: 8}", "data.phases.new.blend", "at least one"),
    ("data.sources.books.validation_fraction=1", "data.sources.books.validation_fraction", "below 1"),
    ("data.sources.books.path=boks", "data.sources.books.path", "hymba data tokenize"),
    ("data.tokenizer=tok", "data.tokenizer", "tokenizer.json"),
    ("data.path=/no/such/place", "data.path", "hymba data prepare-demo"),
    ("checkpoint.load=/no/such/run", "checkpoint.load", "or null"),
    ("logging.profile=10-20", "logging.profile", "START:END"),
    ("run.device=gpu", "run.device", "cuda"),
    ("model.vocab_size=32k", "model.vocab_size", "write 32000"),
    ("data.phases.stable.tokens=1.5T", "data.phases.stable.tokens", "write 1.5e+12"),
    ("schedule.lr_warmup_fraction=1%", "schedule.lr_warmup_fraction", "write 0.01"),
    ("logging.wandb=yes", "logging.wandb", "write true or false"),
    ("parallel.recompute=true", "parallel.recompute", "choose one of none, full"),
    ("precision.fp8=true", "precision.fp8", "delayed, tensorwise, blockwise, mxfp8 or null"),
    ("model.global_layers=0", "model.global_layers", "write model.global_layers=[0]"),
    ("model.kv_groups=[[1,2],[2,3]]", "model.kv_groups", "leave it out of one"),
    ("model.kv_groups=[[1]]", "model.kv_groups", "write [1,2]"),
    ("model.kv_groups=[[1,99]]", "model.kv_groups", "layers are 0..7"),
    ("model.layer_pattern=[hybrid,ssm]", "model.kv_groups", "leave it out"),
    ("model.layer_pattern=[]", "model.layer_pattern", "e.g. [hybrid]"),
    ("model.global_layers=[0,0]", "model.global_layers", "name each once"),
    ("model.rope_original_max_positions=4096", "model.rope_original_max_positions", "at most that"),
    ("precision.scan_backend=mamba", "precision.scan_backend", "known: auto, cuda, triton, torch, reference"),
    ("precision.attention_backend=flx", "precision.attention_backend", "did you mean flex?"),
    ("data.phases.stable.packing=bestfit", "data.phases.stable.packing", "did you mean best_fit?"),
    ("data.phases.stabel.tokens=4096", "data.phases.stabel", "did you mean data.phases.stable?"),
    ("data.phases.stable.rampup_batch_size=[8,1,5]", "data.phases.stable.rampup_batch_size", "start lower"),
    ("data.phases.stable.rampup_batch_size=[4,2,1e9]", "data.phases.stable.rampup_batch_size", "at most that"),
    ("data.sources.books.path=s3://bucket/books", "data.cache", "directory on a local disk"),
    ("run.name=", "run.name", "letters, digits"),
    ("run.name=../elsewhere", "run.name", "letters, digits"),
    ("run.name=${env:USER}", "run.name", "oc.env:VARIABLE"),
    ("cluster=local_test", "cluster=local_test", "hymba launch slurm"),
    ("=demo", "=demo", "write KEY=VALUE"),
    ("optim.lr='1e-3", "optim.lr", "quote the value"),
    ("parallel.world_size=0", "parallel.world_size", "at least 1"),
]


@pytest.mark.parametrize(("override", "key", "fix"), BROKEN, ids=[b[0] for b in BROKEN])
def test_a_broken_override_is_one_line_with_key_and_fix(demo, capsys, override, key, fix):
    assert main(["plan", *demo, override]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1, err  # no follow-up errors either
    assert err.startswith("hymba: error: ") and key in err and fix in err
    assert out == ""


def test_several_problems_are_several_lines(demo, capsys):
    assert main(["plan", *demo, "parallel.context=2", "model.num_query_groups=3", "optim.min_lr=1"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_plan_prints_layers_stages_and_parameters(capsys):
    assert main(["plan", "experiment=pretrain_1p5b", "parallel=pp4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("hymba_1p5b: 1,522,797,824 parameters; 4 processes: data 1 x tensor 1 x pipeline 4")
    rows = [line.split() for line in out.splitlines()]
    assert [r[0] for r in rows if len(r) > 5 and r[1] == "hybrid"] == [str(i) for i in range(32)]
    for row in (
        "16 hybrid window 1024 producer -> 17, 18 gated 2 46,700,932 108.2",
        "2 hybrid window 1024 consumer <- 1 gated 0 45,164,932 104.9",
    ):
        assert row.split() in rows
    assert "Phases (715,254 steps, 1,499,996,356,608 tokens)" in out
    assert "to be given: data.sources.dclm.path (Prefix of a .bin/.idx pair" in out
    assert "\x1b" not in out and all(line == line.rstrip() for line in out.splitlines())


def test_plan_of_interleaved_stages_that_cut_kv_groups(capsys):
    layout = "parallel.pipeline_layout=[8,8,8,8]"
    overrides = ["parallel.virtual_pipeline=2", "parallel.pipeline=2", "parallel.world_size=null", layout]
    assert main(["plan", "experiment=pretrain_1p5b", "parallel=single", *overrides]) == 0
    out = capsys.readouterr().out
    assert "chunk" in out and "0..7, 16..23" in out and "layer 7 (960 values a token)" in out


def test_plan_as_json(capsys):
    assert main(["plan", "experiment=pretrain_1p5b", "--json", "--world-size", "128"]) == 0
    assert json.loads(capsys.readouterr().out)["data_parallel"] == 128


def test_plan_can_leave_files_alone(capsys):
    assert main(["plan", "experiment=demo", "data.path=/no/such/place", "--skip-paths"]) == 0


def test_cfg_and_help_keys(capsys):
    assert main(["train", "--cfg", "experiment=demo", "optim.lr=1"]) == 0
    assert "\n  lr: 1.0\n" in capsys.readouterr().out
    assert main(["train", "--help-keys"]) == 0
    assert "optim.lr (float; default 0.003)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["plam"], "plam: no such verb; did you mean plan?"),
        (["plan", "--jsn"], "hymba plan: unrecognized arguments: --jsn; see hymba plan --help"),
        (["plan", "--world-size", "0", "model=hymba_tiny"], "--world-size 0: give at least 1"),
        (["train", "--nproc", "0", "experiment=demo"], "--nproc 0: give at least 1"),
        (["plan", "--config-dir", "/no/such", "model=hymba_tiny"], "--config-dir /no/such: no such directory"),
        (["plan", "--frozen", "x.yaml", "model=hymba_tiny"], "--frozen: a frozen configuration takes no overrides"),
        (["version", "x"], "hymba version takes no arguments"),
        (["plan"], "model: not chosen; give experiment=... or model=..."),
    ],
)
@pytest.mark.usefixtures("no_launcher")
def test_wrong_use_of_the_command(capsys, argv, line):
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith(f"hymba: error: {line}")


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in cli.VERBS)
    assert main([]) == 2
    assert capsys.readouterr().out == text
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("hymba_train 0.")


@pytest.mark.usefixtures("no_launcher")
def test_train_freezes_and_calls_the_trainer(demo, tmp_path, trained):
    assert main(["train", *demo]) == 0
    [(config, plan)] = trained
    assert load_frozen(tmp_path / "runs" / "demo" / "resolved.yaml") == config == compose(demo)
    assert plan.world_size == 1 and plan.steps.num_steps == 200


@pytest.mark.usefixtures("no_launcher")
def test_train_refuses_another_number_of_processes_than_the_recipe_is_for(demo, capsys, trained):
    assert main(["train", *demo, "parallel=dp2"]) == 2
    err = capsys.readouterr().err
    assert "parallel.world_size=2, but 1 process runs: start 2, or set parallel.world_size=1" in err and not trained


@pytest.mark.usefixtures("no_launcher")
def test_train_refuses_what_is_to_be_given(capsys, tmp_path, trained):
    overrides = ["experiment=pretrain_1p5b", "parallel=single", f"run.directory={tmp_path / 'runs'}"]
    assert main(["plan", *overrides]) == 0
    capsys.readouterr()
    assert main(["train", *overrides]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("hymba: error: data.tokenizer: to be given (Directory with tokenizer.json")
    assert len(lines) == 3 and not trained and not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("no_launcher")
def test_a_second_start_says_what_changed(demo, capsys, trained):
    assert main(["train", *demo]) == 0
    assert main(["train", *demo]) == 0
    assert capsys.readouterr().err == ""
    assert main(["train", *demo, "optim.lr=1e-3"]) == 0
    assert capsys.readouterr().err == "hymba: changed since the last start: optim.lr: 0.003 -> 0.001\n"
    assert main(["train", *demo, "model.ffn_hidden_size=64"]) == 2
    assert "choose another run.name" in capsys.readouterr().err


@pytest.mark.usefixtures("no_launcher")
def test_nproc_plans_first_and_then_becomes_torchrun(demo, tmp_path, monkeypatch, trained):
    started = []
    monkeypatch.setattr(os, "execv", lambda path, argv: started.append((path, argv)))
    main(["train", *demo, "parallel=tp2", "--nproc", "2"])
    [(path, argv)] = started
    resolved = str(tmp_path / "runs" / "demo" / "resolved.yaml")
    assert path == sys.executable
    assert argv[1:] == [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "hymba_train", "train", "--frozen", resolved,
    ]  # fmt: skip
    assert load_frozen(resolved).parallel.tensor == 2 and not trained


@pytest.mark.usefixtures("no_launcher")
def test_nproc_refuses_a_layout_that_does_not_fit(demo, capsys, monkeypatch):
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started although the plan fails"))
    assert main(["train", *demo, "parallel=tp2", "--nproc", "3"]) == 2
    assert "parallel.world_size=2, but 3 processes run" in capsys.readouterr().err


def test_under_torchrun_only_the_first_rank_freezes(demo, tmp_path, monkeypatch, trained):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["train", *demo]) == 0
    assert trained[0][1].world_size == 2 and not (tmp_path / "runs").exists()
    monkeypatch.setenv("RANK", "0")
    assert main(["train", *demo]) == 0
    assert (tmp_path / "runs" / "demo" / "resolved.yaml").is_file()
    assert main(["train", *demo, "--nproc", "2"]) == 2


def test_under_torchrun_one_rank_a_machine_reports(demo, monkeypatch, capsys, trained):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected in (("1", ""), ("0", "hymba: error: optim.min_lr")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(["train", *demo, "optim.min_lr=1"]) == 2
        assert capsys.readouterr().err.startswith(expected)
        assert bool(slept) == (rank == "1") or rank == "0"
    assert slept == [SECONDS_FOR_FIRST_RANK]


@pytest.mark.usefixtures("no_launcher")
def test_a_frozen_run_starts_again_from_its_own_file(demo, tmp_path, trained, capsys):
    assert main(["train", *demo]) == 0
    resolved = tmp_path / "runs" / "demo" / "resolved.yaml"
    before = resolved.stat().st_mtime_ns
    assert main(["train", "--frozen", str(resolved)]) == 0
    assert resolved.stat().st_mtime_ns == before
    assert trained[0][0] == trained[1][0]


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            UserError("data.tokenizer: broken", "second"),
            2,
            "hymba: error: data.tokenizer: broken\nhymba: error: second\n",
        ),
        (KeyboardInterrupt(), 130, "hymba: interrupted\n"),
    ],
)
@pytest.mark.usefixtures("no_launcher")
def test_errors_while_training(demo, capsys, monkeypatch, trained, error, code, text):
    def fail(config, plan):
        raise error

    monkeypatch.setattr(sys.modules["hymba_train.train.main"], "train", fail)
    assert main(["train", *demo]) == code
    assert capsys.readouterr().err == text
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    if code == 2:
        assert main(["train", *demo]) == 2
        assert "hymba: error: [rank 3] second" in capsys.readouterr().err


def test_our_mistakes_keep_their_traceback(demo, monkeypatch, trained, no_launcher):
    def fail(config, plan):
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules["hymba_train.train.main"], "train", fail)
    with pytest.raises(ZeroDivisionError):
        main(["train", *demo])


def test_an_interrupt_that_python_drops_comes_again():
    """In a finaliser it cannot be raised; an import has one at its end, so start-up is full of them."""
    code = """
import os, signal, sys, time, types, weakref
from hymba_train.cli import main

class Thing:
    pass

def work(argv):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    thing = Thing()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGINT))
    del thing
    print("it was dropped", flush=True)
    time.sleep(30)
    return 0

sys.modules["data_prep.cli"] = module = types.ModuleType("data_prep.cli")
module.main = work
sys.exit(main(["data"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "it was dropped\n", "hymba: interrupted\n")


def test_data_is_handed_on(monkeypatch):
    seen = []
    module = type(sys)("data_prep.cli")
    module.main = lambda argv: seen.append(argv) or 5
    monkeypatch.setitem(sys.modules, "data_prep.cli", module)
    assert main(["data", "tokenize", "--workers", "2"]) == 5
    assert seen == [["tokenize", "--workers", "2"]]


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "hymba_train", "plan", "experiment=dmo"],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "hymba: error: experiment=dmo: no such experiment; did you mean demo?\n"


def test_plan_piped_into_head_is_quiet():
    done = subprocess.run(
        f"{sys.executable} -m hymba_train plan experiment=pretrain_1p5b | head -c 1",
        shell=True, capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("h", "")
