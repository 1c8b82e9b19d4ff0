"""Training: schedules, one optimizer step, metrics, the loop, and :func:`.main.train` that joins them."""

from hymba_train.train.quiet import silence

silence()  # here, because Megatron-Core speaks while it is imported
