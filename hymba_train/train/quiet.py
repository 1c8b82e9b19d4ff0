"""Messages of libraries that say nothing to a user of this program, silenced one by one, by name and with the reason.

Everything else that libraries have to say stays.
"""

from __future__ import annotations

import logging
import warnings

# (start of the message as a regular expression, why it is of no use)
WARNINGS = (
    (r"Transformer Engine and Apex are not installed", "the run says which AdamW and which layers it uses"),
    (r"Apex is not installed", "the same"),
    (r"full scope is deprecated", "about CUDA graphs, which are off"),
    (r"MimoModelConfig is experimental", "imported by Megatron-Core's optimizer, not used"),
    (r"The \.grad attribute of a Tensor that is not a leaf", "Megatron-Core clears gradients of its flat shards"),
    (r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", "Megatron-Core's calls"),
    (r"torch\.distributed is disabled, unavailable or uninitialized, assuming", "each rank reads a part by itself"),
    (r"The argument order of load has been changed", "Megatron-Core's call"),
)
LOG_LINES = (
    ("megatron.core.distributed.distributed_data_parallel", "full_param_layout not provided", "it makes the same"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCore's async save is deprecated", "pinned to this version"),
)


def silence() -> None:
    """Install the filters. Idempotent."""
    for message, _ in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, text, _ in LOG_LINES:
        log = logging.getLogger(name)
        if not any(getattr(f, "text", None) == text for f in log.filters):
            log.addFilter(_Without(text))


class _Without(logging.Filter):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in record.getMessage()
