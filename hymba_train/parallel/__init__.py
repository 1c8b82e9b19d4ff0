"""Processes, devices, cuts, gradients: everything that knows of more than one rank."""

from hymba_train.parallel.gradients import finalize_model_grads
from hymba_train.parallel.runtime import Runtime, create_groups, destroy_groups, initialize, shutdown

__all__ = ["Runtime", "create_groups", "destroy_groups", "finalize_model_grads", "initialize", "shutdown"]
