"""What people see: terminal, TensorBoard, W&B, the curve."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from hymba_train.callbacks.curve import LossCurve
from hymba_train.callbacks.jsonl import JsonLines
from hymba_train.callbacks.progress import Progress, format_count, format_seconds
from hymba_train.callbacks.tensorboard import TensorBoard
from hymba_train.callbacks.wandb import WandB, run_id
from hymba_train.errors import UserError
from hymba_train.evaluation.held_out import result_of


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(progress, loop_of):
    loop = loop_of(progress)
    loop.start()
    loop.step(1, mfu=0.4123, mfu_executed=0.3987, memory_gib=12.3)
    loop.emit("on_evaluation_end", result_of({"books": 2.5, "code": 1.25}))
    loop.step(2)
    loop.end()


def test_a_log_file_gets_plain_lines(loop_of):
    stream = io.StringIO()
    run(Progress(1000, 10, ["run x  MFU denominator: H200 bf16 dense 989.5 TFLOP/s x 8"], stream), loop_of)
    text = stream.getvalue()
    assert "\r" not in text and "\x1b" not in text
    lines = text.splitlines()
    assert lines[0].endswith("989.5 TFLOP/s x 8")
    assert lines[2].startswith("step 1/10  short  loss 2.9000  gnorm 0.100  lr 1.00e-03  100 tok  200 tok/s")
    assert "mfu 41.2% (39.9% executed)" in lines[2] and "mem 12.3 GiB" in lines[2] and "eta " in lines[2]
    assert lines[3] == "step 1 held-out loss: books 2.5000  code 1.2500"
    assert "mfu n/a" in lines[4] and "mem" not in lines[4]


def test_a_terminal_line_is_rewritten_and_left_whole(loop_of):
    stream = Terminal()
    run(Progress(1000, 10, [], stream), loop_of)
    text = stream.getvalue()
    assert text.count("\r\x1b[Kstep") >= 2 and text.endswith("\n")
    assert "\r\x1b[Kstep 1 held-out" in text  # the live line makes way


def test_eta_is_the_mean_speed_of_this_process(loop_of, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("hymba_train.callbacks.progress.time.monotonic", lambda: now[0])
    progress = Progress(1000, 10, [], io.StringIO())
    loop = loop_of(progress)
    loop.state.tokens = 500
    loop.start()
    now[0] += 60
    assert progress.eta(600) == format_seconds(4 * 60) == "4m00s"
    assert progress.eta(500) == "?"


def test_numbers_and_times():
    assert [format_count(x) for x in (12, 1234, 1.5e6, 2e9, 3.25e12)] == ["12", "1.23k", "1.50M", "2.00B", "3.25T"]
    assert [format_seconds(x) for x in (5, 65, 3700, 90061)] == ["5s", "1m05s", "1h01m", "1d01h"]


def test_tensorboard_has_the_figures_by_step(tmp_path, loop_of):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loop = loop_of(TensorBoard(tmp_path))
    loop.start()
    loop.step(1)
    loop.step(2)
    loop.emit("on_evaluation_end", result_of({"books": 2.5}))
    loop.end()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("train/loss")] == [(1, 2.9), (2, 2.8)]
    assert [e.value for e in events.Scalars("validation/books/loss")] == [2.5]
    assert "speed/mfu" not in events.Tags()["scalars"]  # a CPU has none


class FakeWandB(SimpleNamespace):
    """The module ``wandb`` as far as we use it."""

    def __init__(self):
        super().__init__(inits=[], logged=[], finished=[])

    def init(self, **kwargs):
        self.inits.append(kwargs)
        return SimpleNamespace(
            define_metric=lambda *args, **kwargs: None,
            log=self.logged.append,
            finish=lambda exit_code=0: self.finished.append(exit_code),
        )


@pytest.fixture
def fake_wandb(monkeypatch):
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


def make_wandb(directory):
    return WandB(directory, "project", None, "demo", {"optim": {"lr": 0.1}})


def test_wandb_keeps_one_id_over_restarts(tmp_path, loop_of, fake_wandb):
    for _ in range(2):
        loop = loop_of(make_wandb(tmp_path))
        loop.start()
        loop.step(1)
        loop.end()
    first, second = fake_wandb.inits
    assert first["id"] == second["id"] == run_id(tmp_path) and len(first["id"]) == 8
    assert first["resume"] == "allow" and first["mode"] == "offline" and first["dir"] == str(tmp_path)
    assert fake_wandb.logged[0]["train/loss"] == 2.9 and fake_wandb.logged[0]["tokens"] == 100
    assert fake_wandb.finished == [0, 0]


def test_another_run_directory_is_another_run(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert run_id(tmp_path / "a") != run_id(tmp_path / "b")


def test_wandb_goes_online_with_a_key_unless_told_otherwise(tmp_path, loop_of, fake_wandb, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    loop_of(make_wandb(tmp_path)).start()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    loop_of(make_wandb(tmp_path)).start()
    assert [i["mode"] for i in fake_wandb.inits] == ["online", "disabled"]
    assert "secret-key" not in repr(fake_wandb.inits)


def test_wandb_hears_of_a_failure(tmp_path, loop_of, fake_wandb):
    callback = make_wandb(tmp_path)
    loop = loop_of(callback)
    loop.start()
    loop.emit("on_exception", RuntimeError())
    callback.close()
    assert fake_wandb.finished == [1]


def test_a_missing_package_is_the_users_to_mend(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"logging\.wandb=true.*pip install wandb"):
        make_wandb(tmp_path)


def test_the_curve_is_drawn_from_the_log(tmp_path, loop_of):
    metrics, image = tmp_path / "metrics.jsonl", tmp_path / "loss_curves.png"
    loop = loop_of(JsonLines(metrics, {}), LossCurve(metrics, image, "demo"))
    loop.start()
    loop.step(1)
    loop.step(2, loss=float("nan"))
    loop.emit("on_evaluation_end", result_of({"books": 2.5}))
    loop.end()
    assert image.read_bytes().startswith(b"\x89PNG")
