"""Learning rate as a pure function of the text tokens trained on.

Nothing here has state: a run that resumes, changes its number of ranks or ramps its batch size has the same rate at
the same token. The shapes are Megatron-Core's (``OptimizerParamScheduler``), counted in tokens instead of samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hymba_train.config.decays import DECAYS
from hymba_train.config.schema import OptimConfig, ScheduleConfig


@dataclass(frozen=True)
class LearningRate:
    """Learning rate of a run: ``schedule(tokens) -> rate``.

    Warm-up from 0 to ``peak`` over ``warmup_tokens``; then, by ``style``: ``constant`` stays; ``cosine`` and ``linear``
    fall to ``minimum`` until ``total_tokens``; ``wsd`` (warm-up, stable, decay; MiniCPM, arXiv:2404.06395) stays and
    falls by ``decay_style`` over the last ``decay_tokens``. After ``total_tokens`` the last rate stays.
    """

    style: str
    peak: float
    minimum: float
    total_tokens: float
    warmup_tokens: float = 0.0
    decay_tokens: float = 0.0
    decay_style: str = "linear"

    @classmethod
    def of(cls, schedule: ScheduleConfig, optim: OptimConfig, total_tokens: int) -> LearningRate:
        """Schedule of a run of ``total_tokens`` text tokens, all phases together. Expects what the plan has checked."""
        return cls(
            schedule.lr_decay_style, optim.lr, optim.min_lr, total_tokens, schedule.lr_warmup_fraction * total_tokens,
            schedule.lr_wsd_decay_fraction * total_tokens, schedule.lr_wsd_decay_style,
        )  # fmt: skip

    def __call__(self, tokens: float) -> float:
        """Rate after ``tokens`` text tokens."""
        if tokens < self.warmup_tokens:
            return self.peak * tokens / self.warmup_tokens
        if self.style == "constant":
            return self.peak
        if self.style == "wsd":
            start, decay = self.total_tokens - self.decay_tokens, DECAYS[self.decay_style]
        else:
            start, decay = self.warmup_tokens, DECAYS[self.style]
        if tokens < start or self.total_tokens <= start:
            return self.peak
        passed = min((tokens - start) / (self.total_tokens - start), 1.0)
        return self.minimum + (self.peak - self.minimum) * decay(passed)

    def of_step(self, tokens_before: int, tokens_in_step: int) -> float:
        """Rate of one optimizer step: that of the middle of its tokens.

        So neither the first step (warm-up from 0) nor the last one (decay to ``minimum``, often 0) is wasted, and a
        step is trained at the mean rate of its tokens whatever the batch size.
        """
        return self(tokens_before + tokens_in_step / 2)


def set_hyperparameters(param_groups: Iterable[dict], lr: float, weight_decay: float) -> None:
    """Write rate and decay into the optimizer's groups; ``wd_mult`` of a group is 0 where nothing decays."""
    for group in param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group["wd_mult"]
