"""Runs whose result depends on a memory like that of FP8's delayed scaling: exact in all that this framework promises.

On a CPU with stand-ins for Transformer Engine's layers; the same with the real ones is in tests/gpu.
"""

from __future__ import annotations

import pytest
from megatron.core import dist_checkpointing

from tests.reliability.test_numerics import guard_events
from tests.train.test_training import exact
from tests.train.tiny_run import write_data

pytestmark = pytest.mark.reliability
FAKE = "from tests.parallel import fake_fp8\nfake_fp8.install()\n"
RUN = {"checkpoint__save_interval": 4, "checkpoint__keep_last": 9, "logging__eval_interval": 0}
STEPS = 10


def losses(root, name: str) -> list[tuple]:
    """Of the steps, without evaluations."""
    return [line for line in exact(root, name) if len(line) > 2]


@pytest.fixture(scope="module")
def root(warm, tmp_path_factory):
    path = tmp_path_factory.mktemp("fp8")
    write_data(path)
    train(warm, path / "runs" / "whole")
    return path


def train(warm, path, patch: str = FAKE, **changes) -> str:
    code, output = warm.train(path, patch=patch, **{"run__train_steps": STEPS, **RUN, **changes})
    assert code == 0, output
    return output


def test_the_memory_is_in_the_checkpoint_and_a_resumed_run_is_exact(warm, root, lone_runtime):
    train(warm, root / "runs" / "resumed", run__train_steps=4)
    saved = dist_checkpointing.load_plain_tensors(str(root / "runs" / "resumed" / "checkpoints" / "step_0000004"))
    amaxes = saved["fp8.decoder.layers.2.ffn.linear_fc1.amax_history_fwd"]
    assert amaxes.shape == (8, 3) and (amaxes[1:] > 0).all()
    train(warm, root / "runs" / "resumed")
    assert losses(root, "resumed") == losses(root, "whole")


def test_without_the_memory_it_begins_anew_and_says_so(warm, root):
    """The control of the test before: a checkpoint of other layers. The memory matters to the loss."""
    path = root / "runs" / "forgetful"
    forgets = "\nfrom hymba_train.checkpoint import save\nsave.tree.fp8_tree = lambda *args: {}\n"
    train(warm, path, FAKE + forgets, run__train_steps=4)
    output = train(warm, path)
    assert "step_0000004 has no scales of FP8: delayed scaling begins anew" in output
    assert losses(root, "forgetful")[:4] == losses(root, "whole")[:4]
    assert losses(root, "forgetful")[4:] != losses(root, "whole")[4:]


def test_evaluations_in_between_change_nothing(warm, root):
    train(warm, root / "runs" / "evaluated", logging__eval_interval=1)
    assert losses(root, "evaluated") == losses(root, "whole")


SPOILED = """
from hymba_train.train.step import Stepper
accumulate, calls = Stepper._accumulate, []
def spoiled(self, *args):
    sums, losses = accumulate(self, *args)
    calls.append(1)
    if len(calls) in BAD:
        sums[0] = float("nan")
    return sums, losses
Stepper._accumulate = spoiled
"""


def test_a_step_that_is_run_again_starts_from_the_same_memory(warm, root):
    """Step 6 comes out bad once."""
    train(warm, root / "runs" / "again", FAKE + SPOILED.replace("BAD", "(6,)"))
    (event,) = guard_events(root, "again")
    assert (event["step"], event["cause"]) == (6, "transient")
    assert losses(root, "again") == losses(root, "whole")


def after_step_6(root, name: str) -> list[tuple]:
    return [line for line in losses(root, name) if line[0] > 6]


LEAVE_OUT = """
from hymba_train.guards.numerics import NumericalGuard
step = NumericalGuard.step
def leaving_out(self, planned, batches, requests, seconds=0.0):
    if self.state.step == 5:
        from hymba_train.guards.ledger import LeftOut
        return self._leave_out(planned, requests, LeftOut(0, 0, 1, 6, "test"))
    return step(self, planned, batches, requests, seconds)
NumericalGuard.step = leaving_out
"""


@pytest.fixture(scope="module")
def never(warm, root) -> list[tuple]:
    """What follows in a run that has not seen step 6 at all."""
    train(warm, root / "runs" / "never", FAKE + LEAVE_OUT, run__train_steps=8)
    return after_step_6(root, "never")


def test_a_step_that_is_skipped_leaves_no_trace(warm, root, never):
    """Step 6 and all that is run to find out why come out bad. Step 7 then is that of a run which never saw them: the
    probes of the search (the rest of the calls in step 6) would move the memory a long way."""
    settings = {"guards__on_persistent": "skip", "run__train_steps": 8}
    train(warm, root / "runs" / "skipped", FAKE + SPOILED.replace("BAD", "(6, 7, 8)"), **settings)
    (event,) = guard_events(root, "skipped")
    assert (event["step"], event["cause"], event["action"]) == (6, "persistent", "skipped")
    assert after_step_6(root, "skipped") == never and len(never) == 2


def test_a_rewind_takes_the_memory_back_to_the_checkpoints(warm, root, never):
    """Step 6 is bad for good the first time: back to step 4, step 6 left out; as a run that skipped it at once."""
    settings = {"guards__on_persistent": "rewind", "run__train_steps": 8}
    train(warm, root / "runs" / "rewound", FAKE + SPOILED.replace("BAD", "(6, 7, 8)"), **settings)
    events = guard_events(root, "rewound")
    assert [(e["step"], e["action"]) for e in events] == [(6, "rewind"), (6, "skipped")]
    rewound, whole = losses(root, "rewound"), losses(root, "whole")
    assert rewound[:5] == whole[:5]
    assert after_step_6(root, "rewound") == never


def test_without_guards_a_step_that_is_not_applied_leaves_no_trace_either(warm, root, never):
    """What is not finite never is (hymba_train.train.step)."""
    settings = {"guards__numerics": False, "run__train_steps": 8}
    train(warm, root / "runs" / "unguarded", FAKE + SPOILED.replace("BAD", "(6,)"), **settings)
    assert after_step_6(root, "unguarded") == never
