"""Which optimizer step trains what: phases, ramp-up of the batch size, tokens. Pure functions of the phases.

A phase of ``tokens`` text tokens takes full batches only: what is left over at its end and does not fill one is not
trained. During ramp-up ``[start, increment, tokens]`` the batch grows in equal shares of those tokens from ``start``
by ``increment`` up to the phase's ``global_batch_size``, and a step never straddles two sizes: a size is kept until
the samples seen in the phase have reached the end of its share.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from hymba_train.config.schema import PhaseConfig


@dataclass(frozen=True)
class Segment:
    """Consecutive steps of one phase with one batch size."""

    phase: str
    phase_index: int
    first_step: int  # over the run, 0-based
    num_steps: int
    global_batch_size: int  # sequences
    seq_length: int  # text tokens
    micro_batch_size: int  # sequences
    first_sample: int  # in the phase
    tokens_before: int  # text tokens of the run before first_step

    @property
    def end_step(self) -> int:
        return self.first_step + self.num_steps

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_length


@dataclass(frozen=True)
class StepInfo:
    """One optimizer step: trains samples first_sample .. first_sample + global_batch_size - 1 of its phase."""

    step: int
    phase: str
    phase_index: int
    first_sample: int
    global_batch_size: int
    micro_batch_size: int
    seq_length: int
    tokens_before: int  # text tokens of the run before this step

    @property
    def num_tokens(self) -> int:
        return self.global_batch_size * self.seq_length


@dataclass(frozen=True)
class StepPlan:
    """All steps of a run, as few segments as there are phases and batch sizes."""

    segments: tuple[Segment, ...]

    @property
    def num_steps(self) -> int:
        return self.segments[-1].end_step if self.segments else 0

    @property
    def num_tokens(self) -> int:
        """Text tokens that all steps train together: the length of the learning-rate schedule."""
        return self.tokens_before(self.num_steps)

    def at(self, step: int) -> StepInfo:
        """Step ``step`` (0-based), in O(log segments). Raises IndexError outside 0..num_steps-1."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is outside 0..{self.num_steps - 1}")
        s = self._segment(step)
        past = step - s.first_step
        return StepInfo(
            step, s.phase, s.phase_index, s.first_sample + past * s.global_batch_size, s.global_batch_size,
            s.micro_batch_size, s.seq_length, s.tokens_before + past * s.tokens_per_step,
        )  # fmt: skip

    def tokens_before(self, step: int) -> int:
        """Text tokens trained when ``step`` steps are done, 0 <= step <= num_steps, else IndexError."""
        if not 0 <= step <= self.num_steps:
            raise IndexError(f"{step} steps are outside 0..{self.num_steps}")
        if not self.segments:
            return 0
        s = self._segment(step)
        return s.tokens_before + (step - s.first_step) * s.tokens_per_step

    def step_at(self, phase_index: int, num_samples: int) -> int:
        """Step that comes next when ``num_samples`` samples of a phase are trained (what a checkpoint knows).

        Raises ValueError if no step of this plan starts there, e.g. after the batch size of that phase was changed.
        """
        own = [s for s in self.segments if s.phase_index == phase_index]
        for s in own:
            past, rest = divmod(num_samples - s.first_sample, s.global_batch_size)
            if 0 <= past <= s.num_steps and not rest:
                return s.first_step + past
        raise ValueError(f"phase {phase_index}: no step starts after {num_samples} samples")

    def _segment(self, step: int) -> Segment:
        return self.segments[bisect_right(self.segments, step, key=lambda s: s.first_step) - 1]


def batch_sizes(phase: PhaseConfig) -> list[int]:
    """Global batch sizes that a phase goes through, in order."""
    if phase.rampup_batch_size is None:
        return [phase.global_batch_size]
    start, increment, _ = phase.rampup_batch_size
    return [*range(start, phase.global_batch_size, increment), phase.global_batch_size]


def plan_steps(phases: Mapping[str, PhaseConfig]) -> StepPlan:
    """Steps of all phases, in their order. Expects phases that :mod:`hymba_train.plan.checks` has passed."""
    segments: list[Segment] = []
    step = tokens = 0
    for index, (name, phase) in enumerate(phases.items()):
        for size, first_sample, num_steps in _phase_segments(phase):
            segments.append(
                Segment(
                    name, index, step, num_steps, size, phase.seq_length, phase.micro_batch_size, first_sample, tokens
                )
            )
            step += num_steps
            tokens += num_steps * size * phase.seq_length
    return StepPlan(tuple(segments))


def _phase_segments(phase: PhaseConfig) -> list[tuple[int, int, int]]:
    """(batch size, first sample, steps) of a phase; sizes that no step uses are left out."""
    num_samples = phase.tokens // phase.seq_length
    sizes, rampup = batch_sizes(phase), phase.rampup_batch_size
    seen = 0
    segments = []
    for level, size in enumerate(sizes):
        end = num_samples
        if rampup is not None and level < len(sizes) - 1:
            # The share of this size ends after (level + 1) / (sizes - 1) of the ramp's tokens, rounded up to samples.
            ramp_tokens = rampup[2] * (level + 1)
            end = min(num_samples, -(-ramp_tokens // ((len(sizes) - 1) * phase.seq_length)))
            num_steps = max(0, -(-(end - seen) // size))
            num_steps = min(num_steps, (num_samples - seen) // size)
        else:
            num_steps = (end - seen) // size
        if num_steps:
            segments.append((size, seen, num_steps))
            seen += num_steps * size
    return segments
