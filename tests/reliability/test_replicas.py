"""R12: a flipped bit in one rank's copy of a parameter or moment is found, by name and rank, before a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hymba_train.checkpoint.directory import complete_steps, step_of
from hymba_train.exit_codes import DRIFTED
from hymba_train.guards.drift import CHUNK_VALUES, checksum, differing
from hymba_train.outcome import read_outcome
from tests.reliability.conftest import torchrun
from tests.reliability.test_numerics import PHASE, guard_events
from tests.train.test_training import exact, run
from tests.train.tiny_run import write_data

pytestmark = pytest.mark.reliability


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_flipped_bit_changes_the_checksum(dtype):
    torch.manual_seed(0)
    tensor = torch.randn(7, 5).to(dtype)
    before = checksum(tensor)
    assert checksum(tensor.clone()) == before
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    width = 8 * tensor.element_size()
    for place in range(tensor.numel()):
        for bit in range(width):
            flipped = tensor.clone()
            mask = 1 << bit if bit < width - 1 else -(1 << bit)
            flipped.view(-1).view(kinds[tensor.element_size()])[place] ^= mask
            assert checksum(flipped) != before, (place, bit)


def test_checksum_sees_swaps_and_later_chunks():
    tensor = torch.arange(CHUNK_VALUES + 10, dtype=torch.float32)
    before = checksum(tensor)
    swapped = tensor.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert checksum(swapped) != before
    swapped = tensor.clone()
    swapped[[3, CHUNK_VALUES + 3]] = swapped[[CHUNK_VALUES + 3, 3]]
    assert checksum(swapped) != before
    assert checksum(torch.empty(0)) == 0


def test_a_majority_names_the_odd_rank_and_two_name_both():
    everyone = [[("norm", None, 1), ("cut", rank % 2, rank % 2)] for rank in range(4)]
    assert differing(everyone) == []
    everyone[2][0] = ("norm", None, 7)
    assert differing(everyone) == ["norm: rank 2 differs from rank 0, 1, 3"]
    everyone = [[("cut", rank % 2, 0)] for rank in range(4)]
    everyone[3][0] = ("cut", 1, 9)
    assert differing(everyone) == ["cut: rank 1 and rank 3 differ, no side has a majority"]


FLIPS = {
    # name: (layout, kind of fault, parameter, what the message names)
    "data": ([], "bit", "decoder.layers.1.mixer.in_proj.weight", "decoder.layers.1.mixer.in_proj.weight:"),
    "moment": ([], "moment", "embedding.meta_tokens", "embedding.meta_tokens (exp_avg):"),
    "tensor": (
        ["parallel.tensor=2"], "bit", "decoder.layers.0.input_norm.weight", "decoder.layers.0.input_norm.weight:",
    ),
}  # fmt: skip


# Saved every 4 steps and compared every 3: step 7's flip is found before step 8's checkpoint is written.
SETTINGS = [PHASE, "guards.drift_interval=3", "checkpoint.save_interval=4", "logging.eval_interval=0"]


def flipped(name: str) -> list[str]:
    layout, kind, parameter, _ = FLIPS[name]
    fault = [f'fault.kind="{kind}"', "fault.step=7", "fault.rank=1", f'fault.parameter="{parameter}"']
    return run(name, *SETTINGS, *layout, *fault)


def hold_to_promise(directory: Path, output: str, name: str) -> None:
    assert "exitcode: 78" in output or "exitcode  : 78" in output
    (event,) = guard_events(directory, name, "drift")
    assert event["step"] == 8 and FLIPS[name][3] in event["problem"], name
    assert "rank 0 and rank 1 differ" in event["problem"]
    lines = (directory / "runs" / name / "metrics.jsonl").read_text().splitlines()
    found = next(i for i, line in enumerate(lines) if '"drift"' in line)
    saved = [line for line in lines[:found] if '"event": "checkpoint"' in line]
    assert len(saved) == 1 and "step_0000004" in saved[0], "no checkpoint of replicas that differ"
    assert read_outcome(directory / "runs" / name).finished, "the restart went on from step 4"


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(700)
def test_flips_in_parameters_and_moments_are_found(tmp_path):
    write_data(tmp_path)
    runs = [run("clean", *SETTINGS), *map(flipped, FLIPS)]
    code, output = torchrun(tmp_path, runs, restarts=len(FLIPS), timeout_seconds=600)
    assert code == 0, output
    assert guard_events(tmp_path, "clean", "drift") == [], "equal replicas are no drift"
    for name, (layout, *_) in FLIPS.items():
        hold_to_promise(tmp_path, output, name)
        if "parallel" not in str(layout):
            assert exact(tmp_path, name) == exact(tmp_path, "clean"), "as if nothing had been"


@pytest.mark.distributed
@pytest.mark.parametrize("end", ["final", "early"])
def test_a_flip_before_the_last_checkpoint_is_found_before_it_is_written(warm, tmp_path, end):
    """In step 7, which no interval comes to: because it is the last, or because somebody asks for a stop in it."""
    write_data(tmp_path)
    patch = f"""
import os
from hymba_train.callbacks.base import Callback
from hymba_train.train import main as training
build_model_chunks, Guards, found = training.build_model_chunks, training.Guards, []
def build(*args, **kwargs):
    found.extend(build_model_chunks(*args, **kwargs))
    return list(found)
class Flip(Callback):
    def on_step_start(self, loop):
        if loop.state.step == 6 and {end == "early"}:
            loop.request_stop("enough")
    def on_step_end(self, loop, metrics):
        if loop.state.step == 7 and os.environ["RANK"] == "1":
            next(found[0].parameters()).data.view(-1)[3] += 1e-3
class First(Guards):
    def __init__(self, *args):
        super().__init__(*args)
        self.callbacks.insert(0, Flip())
training.build_model_chunks, training.Guards = build, First
"""
    path = tmp_path / "runs" / end
    stop = {"run__train_steps": 7} if end == "final" else {}
    settings = {"guards__drift_interval": 1000, "checkpoint__save_interval": 5, "logging__eval_interval": 0}
    warm.start(path, ranks=2, patch=patch, **settings, **stop)
    codes, output = warm.finish()
    assert codes == [DRIFTED, DRIFTED] and "replicas differ after step 7: embedding" in output, output
    (saved,) = complete_steps(path / "checkpoints")
    assert step_of(saved) == 5, "nothing is saved of replicas that differ"
