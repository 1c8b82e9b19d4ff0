"""Where a run stands: everything that decides what the next step does, apart from weights and optimizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass
class TrainState:
    """Counters of a run, saved in every checkpoint as plain integers.

    The data position is (``phase``, ``samples_in_phase``): sample order is a function of the global sample number, so
    no loader state is needed (design contract 5).
    """

    step: int = 0  # optimizer steps done
    phase: int = 0  # index of the phase the next step belongs to
    samples_in_phase: int = 0  # sequences of that phase used so far, over all ranks
    samples: int = 0  # sequences used so far, all phases
    tokens: int = 0  # text tokens used so far, all phases

    def advance(self, num_samples: int, seq_length: int) -> None:
        """Count one optimizer step on ``num_samples`` sequences of ``seq_length`` text tokens."""
        self.step += 1
        self.samples_in_phase += num_samples
        self.samples += num_samples
        self.tokens += num_samples * seq_length

    def start_phase(self, phase: int) -> None:
        """Move to the first sample of a later phase."""
        self.phase, self.samples_in_phase = phase, 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, int]) -> TrainState:
        """Inverse of :meth:`to_dict`. Raises ValueError if a counter is missing or is no integer."""
        names = [f.name for f in fields(cls)]
        for name in names:
            if not isinstance(saved.get(name), int):
                raise ValueError(f"train state has {name}={saved.get(name)!r}, not an integer")
        return cls(**{name: saved[name] for name in names})
