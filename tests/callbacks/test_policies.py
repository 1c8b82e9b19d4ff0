"""When evaluations and checkpoints happen, what is kept, and what a broken logger does to training."""

from __future__ import annotations

import logging

import pytest

from hymba_train.callbacks.base import Callback
from hymba_train.callbacks.checkpointing import Checkpointing
from hymba_train.callbacks.evaluation import Evaluation
from hymba_train.callbacks.never_fatal import HOOKS, NeverFatal
from hymba_train.callbacks.profile import Profile, parse_range
from hymba_train.checkpoint import directory
from hymba_train.errors import ReplicasDiffer, UserError
from hymba_train.evaluation.in_training import EvaluationInTraining
from tests.checkpoint.test_directory import fill


class FakeWriter:
    """Publishes a save two polls later, as a background process would."""

    def __init__(self, root, delay=2):
        self.root, self.delay, self.saves, self._pending = root, delay, [], []
        self.finished_alone = False

    def finish_alone(self):
        self.finished_alone = True

    def save(self, state, wait=False):
        self.saves.append((state["step"], wait))
        path = directory.start_step(self.root, state["step"])
        fill(path)
        self._pending.append([0 if wait else self.delay, path])

    def poll(self, wait=False, sums=()):
        done = []
        for entry in list(self._pending):
            entry[0] -= 1
            if wait or entry[0] < 0:
                self._pending.remove(entry)
                done.append(directory.publish(entry[1]))
        return done


def saved_steps(loop) -> list[tuple[int, int]]:
    """(step of the checkpoint, step at which it was reported)"""
    return [(step, at) for event, *args in loop.reported for step, at in [(args[1], args[2])]]


def train(loop, steps):
    loop.reported = []
    plain_emit = loop.emit

    def emit(event, *args):
        if event == "on_checkpoint_saved":
            loop.reported.append((event, *args, loop.state.step))
        plain_emit(event, *args)

    loop.emit = emit
    loop.start()
    for step in steps:
        loop.step(step)
    loop.end()


def test_checkpoints_by_interval_and_at_the_end(tmp_path, loop_of):
    writer = FakeWriter(tmp_path)
    loop = loop_of(Checkpointing(writer, 3))
    train(loop, range(1, 8))
    assert writer.saves == [(3, False), (6, False), (7, True)]
    assert saved_steps(loop) == [(3, 5), (6, 7), (7, 7)]  # reported when published, not when asked for
    assert [directory.step_of(p) for p in directory.complete_steps(tmp_path)] == [3, 6, 7]


def test_the_last_step_is_not_saved_twice(tmp_path, loop_of):
    writer = FakeWriter(tmp_path)
    loop = loop_of(Checkpointing(writer, 3))
    train(loop, range(1, 4))
    assert writer.saves == [(3, False)] and saved_steps(loop) == [(3, 3)]


def test_interval_zero_saves_at_the_end_only(tmp_path, loop_of):
    writer = FakeWriter(tmp_path)
    train(loop_of(Checkpointing(writer, 0)), range(1, 4))
    assert writer.saves == [(3, True)]


def test_suspect_weights_are_not_saved_in_the_last_step_either(tmp_path, loop_of):
    writer = FakeWriter(tmp_path)
    loop = loop_of(Checkpointing(writer, 1))
    loop.start()
    loop.suspect, loop.stop_reason = True, "the last 5 steps were not applied"
    loop.step(1)
    loop.end(finished=False)
    assert writer.saves == []


@pytest.mark.parametrize(("suspect", "saves"), [(False, [(2, False), (3, True)]), (True, [(2, False)])])
def test_suspect_weights_are_not_saved_when_a_guard_ends_the_run(tmp_path, loop_of, suspect, saves):
    writer = FakeWriter(tmp_path)
    loop = loop_of(Checkpointing(writer, 2))
    loop.suspect = suspect
    train(loop, range(1, 4))
    assert writer.saves == saves and saved_steps(loop)[0][0] == 2, "what was under way is published"


def test_a_finished_run_saves_nothing(tmp_path, loop_of):
    writer = FakeWriter(tmp_path)
    loop = loop_of(Checkpointing(writer, 0))
    loop.state.step = 9
    loop.start()
    loop.end()
    assert writer.saves == []


def test_a_checkpoint_is_reported_before_the_next_save_may_delete_it(tmp_path, loop_of):
    """An export takes hold of it in that report; retention (of one) runs while the next one is written."""

    class Keeping1(FakeWriter):
        def save(self, state, wait=False):
            assert self.poll(wait=True) == [], "a checkpoint is published and nobody has been told"
            super().save(state, wait)

    writer = Keeping1(tmp_path, delay=5)
    train(loop_of(Checkpointing(writer, 2)), range(1, 7))
    assert [step for step, _ in writer.saves] == [2, 4, 6]


def evaluation(run, interval, *is_missing):
    return Evaluation(EvaluationInTraining("validation", interval, run), *is_missing)


def test_the_last_step_is_saved_and_published_before_the_evaluation_that_ends_the_run(tmp_path, loop_of):
    writer, seen = FakeWriter(tmp_path), []
    newest = evaluation(lambda: seen.append(directory.newest(tmp_path)[0]), 0)
    loop = loop_of(newest, Checkpointing(writer, 0))
    loop.start()
    loop.finished = True  # the real loop knows during the last step's hooks
    loop.step(1)
    loop.end()
    assert writer.saves == [(1, True)] and [p.name for p in seen] == ["step_0000001"]


@pytest.mark.parametrize("error", [UserError("a guard says stop"), ReplicasDiffer("replicas differ")])
def test_an_exception_of_all_ranks_gives_a_save_under_way_time(tmp_path, loop_of, error):
    writer = FakeWriter(tmp_path)
    loop = loop_of(Checkpointing(writer, 1))
    loop.start()
    loop.step(1)
    loop.emit("on_exception", RuntimeError("a rank is gone"))
    assert not writer.finished_alone
    loop.emit("on_exception", error)
    assert writer.finished_alone


def test_evaluation_by_interval_and_once_at_the_end(loop_of):
    calls = []
    loop = loop_of(evaluation(lambda: calls.append(1) or float(len(calls)), 2))
    loop.start()
    for step in (1, 2, 3, 4):
        loop.step(step)
    loop.end()
    assert [e for e in loop.emitted if e[0] == "on_evaluation_end"] == [
        ("on_evaluation_end", 1.0), ("on_evaluation_end", 2.0)
    ]  # fmt: skip
    loop = loop_of(evaluation(lambda: calls.append(1), 0))
    loop.start()
    loop.step(1)
    loop.end()
    assert len(calls) == 3


def test_an_early_stop_does_not_wait_for_an_evaluation(loop_of):
    loop = loop_of(evaluation(lambda: pytest.fail("evaluated"), 0))
    loop.start()
    loop.step(1)
    loop.end(finished=False)


def test_nothing_trained_is_not_evaluated(loop_of):
    loop = loop_of(evaluation(lambda: pytest.fail("evaluated"), 1))
    loop.start()
    loop.end()


def test_an_evaluation_that_a_dead_process_owes_is_made_up_for(loop_of):
    """It died between the last checkpoint and the end of the evaluation: the next process has nothing to train."""
    asked = []
    missing = evaluation(lambda: "made up for", 0, lambda step: asked.append(step) or True)
    loop = loop_of(missing, evaluation(lambda: pytest.fail("it is there"), 0, lambda step: False))
    loop.state.step = 7
    loop.start()
    loop.end()
    assert ("on_evaluation_end", "made up for") in loop.emitted and asked == [7]


def test_a_broken_logger_does_not_stop_training(loop_of, caplog):
    class Broken(Callback):
        calls, closed = 0, 0

        def close(self):
            type(self).closed += 1
            raise OSError("still no space left on device")

        def on_log(self, loop, metrics):
            type(self).calls += 1
            raise OSError("no space left on device")

    loop = loop_of(NeverFatal(Broken()))
    with caplog.at_level(logging.WARNING):
        loop.start()
        loop.step(1)
        loop.step(2)
        loop.end()
    assert Broken.calls == 1 and Broken.closed == 1, "what it has opened is released"
    assert [r.getMessage().count("no space left") for r in caplog.records] == [1]


def test_never_fatal_passes_every_hook_on():
    seen = []

    class All(Callback):
        def __getattribute__(self, name):
            if name in HOOKS:
                return lambda *args: seen.append((name, len(args)))
            return object.__getattribute__(self, name)

    wrapped = NeverFatal(All())
    for hook in HOOKS:
        getattr(wrapped, hook)(*([None] if hook == "close" else [None, None]))
    assert {name for name, _ in seen} == set(HOOKS) and len(HOOKS) == 13


def test_ctrl_c_is_not_swallowed():
    class Interrupted(Callback):
        def on_train_start(self, loop):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        NeverFatal(Interrupted()).on_train_start(None)


def test_profile_writes_a_trace_and_tables(tmp_path, loop_of):
    loop = loop_of(Profile("2:3", tmp_path))
    loop.start()
    for step in range(1, 5):
        loop.step(step)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["steps_2_3.shapes.txt", "steps_2_3.trace.json", "steps_2_3.txt"]


@pytest.mark.parametrize("text", ["", "5", "3:2", "0:4", "a:b", "-1:3", "1:2:3"])
def test_profile_range(text):
    with pytest.raises(UserError, match=r"logging\.profile"):
        parse_range(text)
    assert parse_range("10:12") == (10, 12)
