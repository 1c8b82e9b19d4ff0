"""What Megatron-Core must be able to do on a CPU, in one process with some overrides left out.

python -m tests.parallel.cpu_step DIRECTORY [override ...]      prints the losses as hex, then "done"
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import hymba_train.parallel.device as device


def main(directory: Path, skip: tuple[str, ...]) -> None:
    device.activate("cpu", skip)
    from hymba_train.plan import make_plan
    from hymba_train.train.main import train
    from tests.train.tiny_run import tiny_config, write_data

    torch.set_num_threads(1)
    write_data(directory)
    changes = {
        "parallel.distributed_optimizer": True, "parallel.overlap_grad_reduce": True, "parallel.recompute": "full",
        "run.train_steps": 2, "checkpoint.async_save": True,
    }  # fmt: skip
    for last_step in (2, 3):  # the second call resumes
        config = tiny_config(directory, **{**changes, "run.train_steps": last_step})
        train(config, make_plan(config, world_size=1))
    generator = torch.get_rng_state()
    torch.cuda.manual_seed(1)
    assert not torch.equal(generator, torch.get_rng_state()), "seeding the device generator seeded nothing"
    assert torch._dynamo.config.disable, "torch.compile would need a C++ compiler"
    print("done")


if __name__ == "__main__":
    main(Path(sys.argv[1]), tuple(sys.argv[2:]))
