"""The memory of FP8's delayed scaling with Transformer Engine's own layers: tests/reliability/test_fp8_memory on a GPU.

Every run is a process of its own: Transformer Engine keeps what it reduces in a global list.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.children import child_environment
from tests.reliability.test_fp8_memory import SPOILED
from tests.reliability.test_numerics import guard_events
from tests.train.test_training import ROOT, exact
from tests.train.tiny_run import write_data

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

STEPS, SAVED = 8, 4
SETTINGS = {
    "run.device": "cuda", "run.deterministic": True, "run.train_steps": STEPS,
    "precision.params": "bf16", "precision.fp8": "delayed", "precision.layer_spec": "transformer_engine",
    "precision.attention_backend": "torch",
    # Every axis of the products is a multiple of 16; a micro-batch has 16 + 2 x 16 or 16 + 32 rows.
    "model.hidden_size": 64, "model.ffn_hidden_size": 96, "model.num_meta_tokens": 16, "model.mamba_dt_rank": 16,
    "model.mamba_state_dim": 16, "checkpoint.save_interval": SAVED, "logging.eval_interval": 0,
}  # fmt: skip


def train(directory, name: str, patch: str = "", **changes) -> str:
    settings = {**SETTINGS, "run.name": name, **{key.replace("__", "."): value for key, value in changes.items()}}
    code = f"{patch}\nimport sys\nfrom tests.train import tiny_run\nsys.exit(tiny_run.main())"
    arguments = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    env = child_environment(CUBLAS_WORKSPACE_CONFIG=":4096:8")
    done = subprocess.run(
        [sys.executable, "-c", code, str(directory), *arguments], env=env, cwd=ROOT, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and "UserError" not in done.stdout, done.stdout + done.stderr[-4000:]
    return done.stdout + done.stderr


def losses(directory, name: str) -> list[tuple]:
    return [line for line in exact(directory, name) if len(line) > 2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("fp8")
    write_data(path)
    says = "import logging\nlogging.getLogger('hymba_train.train.main').setLevel(logging.INFO)\n"
    assert train(path, "whole", says).count("writes FP8") == 2
    return path


def test_two_runs_are_equal_and_fp8_is_used(directory):
    """What the other tests rest on."""
    train(directory, "twice")
    assert len(losses(directory, "whole")) == STEPS
    assert losses(directory, "twice") == losses(directory, "whole")
    train(directory, "bf16", precision__fp8=None)
    assert losses(directory, "bf16") != losses(directory, "whole")


def test_a_run_whose_kernels_write_fp8_is_exactly_one_with_casts(directory):
    casts = "from hymba_train.model import ffn, mixer\nffn.writes_fp8 = mixer.writes_fp8 = lambda *args: False\n"
    train(directory, "casts", casts)
    assert losses(directory, "casts") == losses(directory, "whole")


def test_a_resumed_run_is_exact(directory):
    train(directory, "resumed", run__train_steps=SAVED)
    train(directory, "resumed")
    assert losses(directory, "resumed") == losses(directory, "whole")


def test_without_the_memory_it_is_not(directory):
    """The control of the test before: the memory matters to the loss."""
    forgets = "from hymba_train.checkpoint import save\nsave.tree.fp8_tree = lambda *args: {}\n"
    train(directory, "forgetful", forgets, run__train_steps=SAVED)
    assert "has no scales of FP8" in train(directory, "forgetful")
    assert losses(directory, "forgetful")[:SAVED] == losses(directory, "whole")[:SAVED]
    assert losses(directory, "forgetful")[SAVED:] != losses(directory, "whole")[SAVED:]


def test_evaluations_in_between_change_nothing(directory):
    train(directory, "evaluated", logging__eval_interval=1)
    assert losses(directory, "evaluated") == losses(directory, "whole")


def test_a_step_that_is_run_again_starts_from_the_same_memory(directory):
    train(directory, "again", SPOILED.replace("BAD", "(4,)"))
    (event,) = guard_events(directory, "again")
    assert (event["step"], event["cause"]) == (4, "transient")
    assert losses(directory, "again") == losses(directory, "whole")


def test_a_rewind_takes_the_memory_back_to_the_checkpoints(directory):
    """Step 6 is bad for good: back to step 4, step 5 again, step 6 left out; as a run whose step 6 was skipped."""
    bad = SPOILED.replace("BAD", "(6, 7, 8)")
    train(directory, "skipped", bad, guards__on_persistent="skip")
    train(directory, "rewound", bad, guards__on_persistent="rewind")
    events = [(e["step"], e["cause"], e["action"]) for e in guard_events(directory, "rewound")]
    assert events[0] == (6, "persistent", "rewind") and [action for *_, action in events[1:]] == ["skipped"]
    skipped, rewound = losses(directory, "skipped"), losses(directory, "rewound")
    assert rewound[:5] == skipped[:5] and rewound[6:] == skipped[6:] and len(rewound) == STEPS
