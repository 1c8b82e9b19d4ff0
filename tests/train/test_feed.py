"""The feed gives the loop this rank's micro-batches ahead of time, from pinned memory where a GPU takes them."""

from types import SimpleNamespace

import pytest
import torch

from hymba_train.data.batches import micro_batches
from hymba_train.data.build import build_training_data
from hymba_train.plan.steps import plan_steps
from hymba_train.train.feed import Feed
from hymba_train.train.order import Order
from hymba_train.train.state import TrainState
from tests.train.tiny_run import VOCAB, tiny_config, write_data


@pytest.fixture
def feed_of(tmp_path):
    """feed_of(device, state, rank, size) -> (feed, order, data)."""
    write_data(tmp_path)
    config = tiny_config(tmp_path)
    data = build_training_data(config.data, seed=1, vocab_size=VOCAB)
    feeds = []

    def make(device: str = "cpu", state: TrainState | None = None, rank: int = 0, size: int = 1):
        runtime = SimpleNamespace(device=torch.device(device), data_parallel_rank=rank, data_parallel_size=size)
        order = Order(config, plan_steps(config.data.phases))
        feeds.append(Feed(data, order, state or TrainState(), runtime))
        return feeds[-1], order, data

    yield make
    for feed in feeds:
        feed.close()


def tensors(batches) -> list[torch.Tensor]:
    return [value for batch in batches for value in batch.values()]


def walk(feed, order, state: TrainState):
    while (step := order.next(state)) is not None:
        yield step, feed.load(step)
        if step.phase != state.phase:
            state.start_phase(step.phase)
        state.advance(step.batch_size, step.seq_length)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_step_gets_this_ranks_samples_over_a_phase_border(feed_of, rank):
    feed, order, data = feed_of(rank=rank, size=2)
    phases = []
    for step, batches in walk(feed, order, TrainState()):
        expected = micro_batches(
            data, step.phase, step.first_sample, global_batch_size=step.batch_size,
            micro_batch_size=step.micro_batch_size, data_parallel_rank=rank, data_parallel_size=2,
        )  # fmt: skip
        assert len(batches) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(tensors(batches), tensors(expected), strict=True))
        phases.append(step.phase_name)
    assert set(phases) == {"short", "long"}


def test_a_state_from_the_middle_of_a_phase_goes_on_there(feed_of):
    feed, order, _ = feed_of()
    everything = [(step, tensors(batches)) for step, batches in walk(feed, order, TrainState())]
    state = TrainState(step=2, phase=0, samples_in_phase=16, samples=16, tokens=256)
    feed, order, _ = feed_of(state=state)
    resumed = [(step, tensors(batches)) for step, batches in walk(feed, order, state)]
    assert [step for step, _ in resumed] == [step for step, _ in everything[2:]]
    for (_, found), (_, expected) in zip(resumed, everything[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_loop_and_the_feed_cannot_drift_apart(feed_of):
    feed, order, _ = feed_of()
    state = TrainState()
    state.advance(8, 16)
    with pytest.raises(AssertionError, match="the loop is at"):
        feed.load(order.next(state))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_is_pinned_for_a_gpu_in_the_thread_that_prepares(feed_of, monkeypatch, device):
    """Without a GPU: what is asked for, and where. Pinning is slow, so the loop must not wait for it."""
    import threading

    pinned: list[str] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(threading.current_thread().name)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    feed, order, _ = feed_of(device)
    batches = feed.load(order.next(TrainState()))
    assert all(tensor.device.type == "cpu" for tensor in tensors(batches)), "the step moves them"
    feed.close()
    if device == "cpu":
        assert not pinned
    else:
        assert len(pinned) >= len(tensors(batches))
        assert set(pinned) == {"prefetch"}


@pytest.mark.gpu
def test_batches_lie_in_pinned_memory(feed_of):
    feed, order, _ = feed_of("cuda")
    for _, batches in walk(feed, order, TrainState()):
        assert all(tensor.is_pinned() for tensor in tensors(batches))
