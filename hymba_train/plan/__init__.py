"""Everything that can be known and checked before a GPU is held. Free of torch; ``hymba plan`` prints it."""

from hymba_train.plan.plan import LayerPlan, PhasePlan, Plan, make_plan
from hymba_train.plan.stages import Border, Chunk
from hymba_train.plan.steps import Segment, StepInfo, StepPlan, batch_sizes, plan_steps

__all__ = [
    "Border",
    "Chunk",
    "LayerPlan",
    "PhasePlan",
    "Plan",
    "Segment",
    "StepInfo",
    "StepPlan",
    "batch_sizes",
    "make_plan",
    "plan_steps",
]
