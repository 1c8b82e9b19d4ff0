"""Start-up of one process: device, torch.distributed, Megatron-Core's process groups."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hymba_train.config.schema import Config, GuardsConfig, ParallelConfig
from hymba_train.errors import UserError
from hymba_train.parallel import device as device_module


@dataclass(frozen=True)
class Runtime:
    """Where this process stands. ``groups`` is Megatron-Core's ProcessGroupCollection."""

    device: torch.device
    groups: Any
    rank: int
    world_size: int

    @property
    def tensor_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def tensor_size(self) -> int:
        return self.groups.tp.size()

    @property
    def pipeline_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def pipeline_size(self) -> int:
        return self.groups.pp.size()

    @property
    def data_parallel_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def data_parallel_size(self) -> int:
        return self.groups.dp.size()

    @property
    def is_logging_rank(self) -> bool:
        """Rank 0 speaks."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1


def initialize(config: Config) -> Runtime:
    """Device, default process group (torchrun's environment, or a lone process), and parallel groups.

    Raises UserError if the number of processes does not fit the layout.
    """
    device = device_module.activate(config.run.device)
    if not dist.is_initialized():
        _init_process_group(device, config.guards)
    return create_groups(config.parallel, device)


def create_groups(parallel: ParallelConfig, device: torch.device) -> Runtime:
    """Groups of one layout over the running default process group (tests call it once a layout)."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    world_size, block = dist.get_world_size(), parallel.tensor * parallel.pipeline
    if world_size % block:
        raise UserError(
            f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} does not divide the "
            f"{world_size} processes that run: start a multiple of {block}"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        create_gloo_process_groups=False,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Runtime(device, groups, dist.get_rank(), world_size)


def destroy_groups() -> None:
    """Forget the parallel groups; the default process group lives on."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def shutdown() -> None:
    """Leave torch.distributed."""
    if dist.is_initialized():
        destroy_groups()
        dist.destroy_process_group()


def _init_process_group(device: torch.device, guards: GuardsConfig) -> None:
    # A collective that times out names only ranks that waited in it: the watchdog, which names the other, comes first.
    seconds = 600 if guards.hang_seconds is None else max(600, guards.hang_seconds, guards.hang_slow_seconds) + 60
    common = dict(
        backend=device_module.backend(device),
        timeout=timedelta(seconds=seconds),
        device_id=device if device.type == "cuda" else None,
    )
    if "RANK" in os.environ:
        dist.init_process_group(**common)
    else:  # not under torchrun or srun: a lone process is a group of one, and needs neither port nor environment
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1, **common)
