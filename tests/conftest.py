"""Common to all tests: one thread (the machine may be small, and sums must not depend on it), a lone process group."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.device import ON_GPUS, what_is_missing


def pytest_configure(config):
    """Not one test passes by being skipped because the GPUs that were asked for are not there."""
    missing = what_is_missing()
    if missing:
        raise pytest.UsageError(missing)


def pytest_collection_modifyitems(items):
    """Tests that need hardware say what is missing instead of failing."""
    if ON_GPUS:
        for item in items:
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(900))  # kernels are compiled
    marks = [("gpu", 1), ("multigpu", 2)]
    if not any(item.get_closest_marker(name) for item in items for name, _ in marks):
        return
    import torch

    for item in items:
        for name, needed in marks:
            if item.get_closest_marker(name) and torch.cuda.device_count() < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU(s), found {torch.cuda.device_count()}"))


@pytest.fixture(scope="session")
def lone_runtime():
    """Runtime of a process group of one on the CPU, without tensor or pipeline parallelism."""
    import torch

    from hymba_train.config.schema import Config
    from hymba_train.parallel import initialize

    torch.set_num_threads(1)
    config = Config()
    config.run.device = "cpu"
    return initialize(config)


@pytest.fixture(scope="session")
def gpu_runtime():
    """The same on a GPU, without TF32. A process is for the CPU or for a GPU: these tests run apart, with -m gpu."""
    import torch

    from hymba_train.config.schema import Config
    from hymba_train.parallel import initialize

    config = Config()
    config.run.device = "cuda"
    torch.backends.cuda.matmul.allow_tf32 = False
    return initialize(config)
