"""Builds models on the meta device as every rank of a layout would, without starting the ranks.

python -m tests.model.build_on_meta OVERRIDE[,OVERRIDE...] ...      prints {overrides: parameters held, by name}
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from hymba_train.config import compose
from hymba_train.model import build_model_chunks
from hymba_train.parallel import create_groups, destroy_groups
from hymba_train.parallel.device import activate
from hymba_train.plan import make_plan


def parameters_of(overrides: list[str]) -> dict[str, int]:
    """Name -> true values of it that all ranks of one model copy hold together (copies counted once)."""
    config = compose([*overrides, "run.device=cpu"])
    config.precision.layer_spec = "local"
    config.precision.attention_backend = config.precision.scan_backend = "torch"
    config.precision.fp8 = None
    world_size = config.parallel.tensor * config.parallel.pipeline
    config.parallel.world_size = None
    plan = make_plan(config, world_size=world_size, check_paths=False)
    held: dict[str, set] = {}
    sizes: dict[tuple, int] = {}
    for rank in range(world_size):
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        runtime = create_groups(config.parallel, torch.device("cpu"))
        ranges = [chunk.layers for chunk in plan.chunks]
        for model in build_model_chunks(config, runtime, ranges, device=torch.device("meta")):
            for name, param, _, cut in model.described_parameters():
                assert param.is_meta and tuple(param.shape) == cut.shape, (name, param.shape, cut.shape)
                other = param.numel() // (cut.shape[cut.description.axis] if cut.slices else 1)
                for s in cut.slices:
                    piece = (s.full_start + s.start, s.count)
                    held.setdefault(name, set()).add(piece)
                    sizes[name, piece] = s.count * other
                if not cut.slices:
                    held.setdefault(name, set()).add(None)
                    sizes[name, None] = param.numel()
        destroy_groups()
        dist.destroy_process_group()
    return {name: sum(sizes[name, piece] for piece in pieces) for name, pieces in held.items()}


if __name__ == "__main__":
    activate("cpu")
    print("RESULT" + json.dumps({argument: parameters_of(argument.split(",")) for argument in sys.argv[1:]}))
