"""Reading faulthandler's dumps: does a rank wait for others, or do others wait for it? Standard library only."""

import re

# Where the innermost frame of a rank that waits for others, or for its device, is. In our step it is the line that
# reads the device's results; Megatron-Core's modules wait for what they have sent or asked for.
_INNERMOST = (
    re.compile(r'hymba_train/train/step\.py", line \d+ in (wait|exchange|micro_batch_losses|evaluate)$'),
    # Between steps: the agreement about a save, or the writer itself; the comparison of replicas.
    re.compile(r'hymba_train/checkpoint/save\.py", line \d+ in (_sums|_count_bytes|_finish)$'),
    re.compile(r'hymba_train/guards/drift\.py", line \d+ in (_differ|check)$'),
    re.compile(r'megatron/core/(pipeline_parallel|distributed|tensor_parallel)/[^"]*", line'),
    re.compile(r'megatron/core/optimizer/clip_grads\.py", line'),
    re.compile(r'torch/cuda/[^"]*", line \d+ in (synchronize|wait)'),
)
# torch.distributed's calls are wrapped once by its logger.
_DISTRIBUTED, _DISTRIBUTED_DEPTH = re.compile(r'torch/distributed/[^"]*", line'), 3
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)\b.*\(most recent call first\):$")


def threads(dump: str) -> dict[int, list[str]]:
    """Frames of each thread by its ident, innermost first, as 'File "...", line 12 in name'."""
    found: dict[int, list[str]] = {}
    frames: list[str] = []
    for line in dump.splitlines():
        match = _THREAD.match(line)
        if match:
            frames = found.setdefault(int(match[1], 16), [])
        elif line.startswith("  File "):
            frames.append(line.strip())
    return found


def is_waiting(frames: list[str]) -> bool:
    """Whether a thread with these frames waits in communication or for its device; false if nothing is known."""
    if not frames:
        return False
    return any(pattern.search(frames[0]) for pattern in _INNERMOST) or any(
        _DISTRIBUTED.search(frame) for frame in frames[:_DISTRIBUTED_DEPTH]
    )
