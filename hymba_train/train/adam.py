"""AdamW for Megatron-Core where neither Transformer Engine nor Apex is installed (a CPU, a bare PyTorch GPU).

Megatron-Core falls back on ``torch.optim.AdamW`` there, which keeps a step count per parameter. Its distributed
optimizer cannot resume a checkpoint then: ``state_dict()`` asserts on a fresh optimizer, the fully reshardable loader
raises KeyError 'step', and a restored step is one tensor shared by all parameters, which torch increments once per
parameter. FusedAdam (Transformer Engine, Apex) keeps the count in the parameter group; so does the class here, and
Megatron-Core then takes the same path, with the same checkpoint layout, with and without those libraries.
"""

from __future__ import annotations

import logging

import torch
from torch.optim.adamw import adamw

logger = logging.getLogger(__name__)


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with one step count per parameter group.

    The arithmetic is PyTorch's functional AdamW: one fused kernel on a GPU, the plain loop on a CPU. Takes FusedAdam's
    arguments; ``params`` are float32 tensors or groups of them, each group with lr, betas, eps, weight_decay.

    Raises ValueError for an argument of FusedAdam that would change the arithmetic.
    """

    def __init__(
        self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, adam_w_mode: bool = True, capturable: bool = False,
    ) -> None:  # fmt: skip
        if not adam_w_mode or capturable:
            raise ValueError("GroupStepAdamW has decoupled weight decay and no CUDA graph: install Transformer Engine")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient; both moments are float32 tensors in ``state[parameter]``."""
        assert closure is None, "Megatron-Core never passes a closure"
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            # Counted also where a rank of the distributed optimizer holds nothing of the group: ranks stay alike.
            group["step"] = int(group.get("step", 0)) + 1
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            on_gpu = params[0].is_cuda
            # The kernel wants one step tensor a parameter and increments it first.
            steps = torch.full((len(params),), group["step"] - 1.0, device=params[0].device).unbind()
            beta1, beta2 = group["betas"]
            adamw(
                params, [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params], [self.state[p]["exp_avg_sq"] for p in params], [],
                list(steps), foreach=False, fused=on_gpu, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
                weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip


def install_adam() -> str:
    """Make Megatron-Core use :class:`GroupStepAdamW` if it found no FusedAdam; returns the name of the class in use.

    Call before the optimizer is built. Idempotent.
    """
    from megatron.core import optimizer as factory
    from megatron.core.optimizer import distrib_optimizer

    if factory.USING_PYTORCH_OPTIMIZER:
        factory.Adam = distrib_optimizer.Adam = GroupStepAdamW
        factory.USING_PYTORCH_OPTIMIZER = False
        # What these flags really say is that the step count is in the parameter group.
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
        logger.info("AdamW: hymba_train.train.adam.GroupStepAdamW (neither Transformer Engine nor Apex is installed)")
    return f"{factory.Adam.__module__}.{factory.Adam.__qualname__}"
