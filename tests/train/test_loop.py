"""The loop with a fake step: what is called when, and who may end it."""

from __future__ import annotations

import pytest
import torch

from hymba_train.callbacks.base import Callback
from hymba_train.train.loop import Loop, PlannedStep
from hymba_train.train.metrics import Peak, ThroughputMeter
from hymba_train.train.state import TrainState
from hymba_train.train.step import StepResult

LENGTHS = [3, 2]  # steps in each phase


class FakeSteps:
    def next(self, state):
        done, phase = state.samples_in_phase // 4, state.phase
        while phase < len(LENGTHS) and done >= LENGTHS[phase]:
            phase, done = phase + 1, 0
        if phase == len(LENGTHS):
            return None
        return PlannedStep(phase, f"phase{phase}", done * 4, 4, 2, 8, lr=0.1, flops_per_token=1.0)


class Recorder(Callback):
    def __init__(self):
        self.calls = []

    def __getattribute__(self, name):
        if name.startswith("on_") or name == "close":
            calls = object.__getattribute__(self, "calls")
            own = type(self).__dict__.get(name)

            def hook(*args):
                calls.append(name)
                if own:
                    own(self, *args)

            return hook
        return object.__getattribute__(self, name)


def make(callbacks, state=None, other_ranks=(0,), train=None, **kwargs) -> Loop:
    def fake_train(step, batches, requests):
        summed = tuple(a + b for a, b in zip(requests, other_ranks, strict=True))
        return StepResult(1.5, 0.5, 32, summed)

    meter = ThroughputMeter(torch.device("cpu"), 1, Peak(None, "n/a"))
    return Loop(
        state or TrainState(), FakeSteps(), callbacks, meter, load=lambda step: [], train=train or fake_train, **kwargs
    )


def test_runs_all_phases_and_counts():
    phases, recorder = [], Recorder()
    loop = make([recorder], start_phase=lambda step: phases.append(step.phase_name), log_interval=2)
    state = loop.run()
    assert state == TrainState(step=5, phase=1, samples_in_phase=8, samples=20, tokens=160)
    assert phases == ["phase0", "phase1"]
    assert loop.stop_reason == "all phases trained"
    per_step = ["on_step_start", "on_batch_loaded", "on_step_end"]
    logged = ["on_step_start", "on_batch_loaded", "on_log", "on_step_end"]
    assert recorder.calls == [
        "on_train_start", "on_phase_start", *per_step, *logged, *per_step,
        "on_phase_start", *logged, *logged,  # step 4 by the interval, step 5 as the last
        "on_train_end", "close",
    ]  # fmt: skip


def test_continues_in_the_middle_of_a_phase():
    recorder = Recorder()
    loop = make([recorder], TrainState(step=4, phase=1, samples_in_phase=4, samples=16, tokens=128))
    assert loop.run().step == 5
    assert recorder.calls.count("on_phase_start") == 1 and recorder.calls.count("on_step_end") == 1
    assert loop.trained


def test_a_finished_run_trains_nothing():
    recorder = Recorder()
    loop = make([recorder], TrainState(step=5, phase=1, samples_in_phase=8, samples=20, tokens=160))
    loop.run()
    assert "on_step_start" not in recorder.calls and not loop.trained


def test_train_steps_counts_steps_of_the_run():
    loop = make([], TrainState(step=1, samples_in_phase=4, samples=4, tokens=32), train_steps=3)
    assert loop.run().step == 3
    assert loop.stop_reason == "run.train_steps reached"


def test_a_stop_takes_effect_when_all_ranks_know():
    class StopAtTwo(Callback):
        def on_step_end(self, loop, metrics):
            if metrics.step == 2:
                loop.request_stop("signal 15")

    recorder = Recorder()
    loop = make([StopAtTwo(), recorder])
    assert loop.run().step == 3  # told the others along with step 3's loss
    assert loop.stop_reason == "signal 15"
    assert "on_train_end" in recorder.calls


def test_another_rank_may_stop_the_run():
    loop = make([], other_ranks=(1,))
    assert loop.run().step == 1
    assert loop.stop_reason == "another rank asked to stop"


def test_an_exception_is_shown_to_all_and_raised():
    recorder = Recorder()

    def train(step, batches, requests):
        raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        make([recorder], train=train).run()
    begun = ["on_train_start", "on_phase_start", "on_step_start", "on_batch_loaded"]
    assert recorder.calls == [*begun, "on_exception", "close"]


def test_batch_hash_of_logged_steps_only():
    hashes = []

    class Watch(Callback):
        def on_step_end(self, loop, metrics):
            hashes.append(metrics.batch_hash)

    make([Watch()], batch_hash=lambda step: f"{step.phase}:{step.first_sample}", log_interval=2).run()
    assert hashes == [None, "0:4", None, "1:0", "1:4"]


def test_state_survives_a_dict_and_refuses_a_damaged_one():
    state = TrainState(3, 1, 4, 16, 128)
    assert TrainState.from_dict(state.to_dict()) == state
    with pytest.raises(ValueError, match="samples_in_phase"):
        TrainState.from_dict({**state.to_dict(), "samples_in_phase": "4"})


def acting(**actions):
    """A train function that has something else to say about some steps."""
    calls = []

    def train(step, batches, requests):
        calls.append((step.phase, step.first_sample))
        action = actions.get(f"call{len(calls)}", "updated")
        return StepResult(1.5, 0.5, 32, (0,), action, "bad step", None if action == "updated" else {"step": 1})

    return train, calls


def test_a_guard_that_stops_ends_the_run_before_the_bad_step():
    recorder, (train, _) = Recorder(), acting(call3="stop")
    loop = make([recorder], train=train)
    assert loop.run().step == 2 and loop.failed and loop.stop_reason == "bad step"
    assert recorder.calls[-3:] == ["on_guard", "on_train_end", "close"]


def lost(*calls):
    return acting(**dict.fromkeys([f"call{number}" for number in calls], "lost"))[0]


def test_a_run_that_is_not_trained_any_more_fails_before_its_end():
    seen = []

    class Watch(Callback):
        def on_step_end(self, loop, metrics):
            seen.append((loop.state.step, loop.suspect))

    loop = make([Watch()], train=lost(2, 3, 4), max_lost=1)
    assert loop.run().step == 3 and loop.failed and not loop.finished
    assert loop.stop_reason == "the last 2 steps were not applied: bad step"
    assert seen == [(1, False), (2, False), (3, True)], "known before the step's hooks: nothing is saved"


def test_a_run_of_which_no_step_was_applied_does_not_finish():
    loop = make([], train=lost(1, 2, 3, 4, 5))
    assert loop.run().step == 5 and loop.failed and loop.suspect and not loop.finished
    assert loop.stop_reason == "the last 5 steps were not applied: bad step"


def test_lost_steps_now_and_then_are_no_failure():
    loop = make([], train=lost(1, 2, 4, 5), max_lost=2)
    assert loop.run().step == 5 and loop.finished and loop.stop_reason == "all phases trained"


def test_a_rewind_goes_on_from_the_state_that_was_loaded():
    recorder, (train, calls) = Recorder(), acting(call4="rewind")

    def go_back() -> bool:
        loop.state.__dict__.update(TrainState(step=1, samples_in_phase=4, samples=4, tokens=32).to_dict())
        return True

    phases = []
    loop = make([recorder], train=train, go_back=go_back, start_phase=lambda step: phases.append(step.phase))
    assert loop.run().step == 5 and not loop.failed
    assert calls == [(0, 0), (0, 4), (0, 8), (1, 0), (0, 4), (0, 8), (1, 0), (1, 4)]
    assert phases == [0, 1, 0, 1] and recorder.calls.count("on_rewind") == 1


def test_a_rewind_without_a_checkpoint_ends_the_run():
    train, _ = acting(call2="rewind")
    loop = make([], train=train)
    assert loop.run().step == 1 and loop.failed and "no checkpoint to go back to" in loop.stop_reason


def test_what_this_rank_is_asked_travels_with_the_step():
    seen = []

    class Sums(Callback):
        def on_step_end(self, loop, metrics):
            seen.append(loop.answers)

    numbers = iter([(0, 1), (0, 1), (1, 0), (0, 0), (0, 0)])
    make([Sums()], other_ranks=(0, 2, 5), ask=lambda: next(numbers)).run()
    assert seen == [(2, 6), (2, 6), (3, 5), (2, 5), (2, 5)]
