"""AdamW for Megatron-Core on every device: the step count is in the group, and the update waits for nobody.

Megatron-Core takes FusedAdam of Transformer Engine or Apex, else ``torch.optim.AdamW``. Neither serves here:

- torch's keeps a step count per parameter, and the distributed optimizer cannot resume a checkpoint then:
  ``state_dict()`` asserts on a fresh optimizer, the fully reshardable loader raises KeyError 'step', and a restored
  step is one tensor shared by all parameters, which torch increments once per parameter.
- FusedAdam wants gradients that are averaged and clipped already, which costs two passes over them, and to be called
  only once the host has seen that the step is good, which leaves the GPU idle meanwhile.

:class:`GroupStepAdamW` keeps the count in the group, so Megatron-Core takes the path (and the checkpoint layout) that
it has for FusedAdam. What gradients are divided by, and whether the step counts, it reads on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with one step count per parameter group.

    The arithmetic is PyTorch's: its fused kernel on a GPU, the plain loop on a CPU. Takes FusedAdam's arguments;
    ``params`` are float32 tensors or groups of them, each group with lr, betas, eps, weight_decay.

    Attributes:
        divisor: float32 [1] on the parameters' device: gradients are divided by it, in place. None: by nothing.
        skip: float32 [1] there: 1 leaves weights and moments as they are, 0 updates. None: always updates.
            The count in the groups is the caller's to put right (:meth:`uncount`) when it learns of a skip.

    Raises ValueError for an argument of FusedAdam that would change the arithmetic.
    """

    def __init__(
        self, params: ParamsT, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, adam_w_mode: bool = True, capturable: bool = False,
    ) -> None:  # fmt: skip
        if not adam_w_mode or capturable:
            raise ValueError("GroupStepAdamW has decoupled weight decay and takes its rate from the host")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.divisor: Tensor | None = None
        self.skip: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # Megatron-Core never passes a closure
        """Update every parameter that has a gradient; both moments are float32 tensors in ``state[parameter]``."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            # Counted also where a rank of the distributed optimizer holds nothing of the group: ranks stay alike.
            group["step"] = int(group.get("step", 0)) + 1
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            tensors = (
                params, [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params], [self.state[p]["exp_avg_sq"] for p in params],
            )  # fmt: skip
            (self._fused if params[0].is_cuda else self._plain)(group, *tensors)

    def uncount(self) -> None:
        """Take back the last :meth:`step` in the groups' counts: it was skipped."""
        for group in self.param_groups:
            group["step"] -= 1

    def _fused(self, group: dict, params: list, grads: list, exp_avgs: list, exp_avg_sqs: list) -> None:
        # The kernel only reads the count, so one tensor serves all; filled on the device, the host does not wait.
        count = torch.full((), float(group["step"]), device=params[0].device)
        torch._fused_adamw_(
            params, grads, exp_avgs, exp_avg_sqs, [], [count] * len(params), lr=group["lr"],
            beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"],
            amsgrad=False, maximize=False, grad_scale=self.divisor, found_inf=self.skip,
        )  # fmt: skip

    def _plain(self, group: dict, params: list, grads: list, exp_avgs: list, exp_avg_sqs: list) -> None:
        # Not torch's fused kernel for the CPU: what it makes of a value depends on where a tensor begins, so layouts
        # that cut parameters in other places would drift apart.
        if self.skip is not None and bool(self.skip):
            return
        if self.divisor is not None:
            torch._foreach_div_(grads, self.divisor)
        # The loop wants one count a parameter and increments it first.
        counts = torch.full((len(params),), group["step"] - 1.0).unbind()
        beta1, beta2 = group["betas"]
        adamw(
            params, grads, exp_avgs, exp_avg_sqs, [], list(counts), foreach=False, fused=False, amsgrad=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=False,
        )  # fmt: skip


def install_adam() -> None:
    """Make Megatron-Core use :class:`GroupStepAdamW`. Call before the optimizer is built. Idempotent."""
    from megatron.core import optimizer as factory
    from megatron.core.optimizer import distrib_optimizer

    factory.Adam = distrib_optimizer.Adam = GroupStepAdamW
    factory.USING_PYTORCH_OPTIMIZER = False
    # What these flags really say is that the step count is in the parameter group.
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
