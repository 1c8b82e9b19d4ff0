"""A step that is bad is not applied; what is done about it follows from its cause.

The limits of loss and gradient norm go along with the step, and the device keeps them
(:meth:`hymba_train.train.step.Stepper.step`): a bad step changes neither weights nor moments, and nobody waits for the
verdict. All ranks have the same two numbers, hence the same verdict, without asking each other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hymba_train.config.schema import GuardsConfig
from hymba_train.data.batches import MicroBatch
from hymba_train.data.dataset import TrainingData
from hymba_train.guards.batches import emptied, name_samples, samples_of
from hymba_train.guards.classify import Diagnosis, diagnose
from hymba_train.guards.judge import Judge
from hymba_train.guards.ledger import Ledger, LeftOut
from hymba_train.parallel.fp8_state import Fp8State
from hymba_train.parallel.runtime import Runtime
from hymba_train.train.loop import PlannedStep
from hymba_train.train.state import TrainState
from hymba_train.train.step import Gradients, Limits, Stepper, StepResult, result_of

logger = logging.getLogger(__name__)
MOST_NAMED = 4  # micro-batches whose samples are named in a log


class NumericalGuard:
    """Trains steps as ``stepper`` would, except bad ones.

    Args:
        state: the loop's; its ``step`` counts the steps before the one at hand.
        ledger: samples to leave out, the same on every rank.
        fp8: moves on with every forward and backward pass; here only with those of steps that are applied.
    """

    def __init__(
        self, config: GuardsConfig, stepper: Stepper, data: TrainingData, runtime: Runtime, state: TrainState,
        ledger: Ledger, fp8: Fp8State,
    ) -> None:  # fmt: skip
        self.config, self.stepper, self.data, self.runtime = config, stepper, data, runtime
        self.state, self.ledger, self.fp8 = state, ledger, fp8
        self.judge = Judge(config)
        self.touch: Callable[[], None] = lambda: None  # called during a long search: it gets on
        self._good_batches: tuple[int, list[MicroBatch]] | None = None  # (phase, batches) of the last accepted step

    def step(
        self, planned: PlannedStep, batches: list[MicroBatch], requests: tuple[int, ...], seconds: float = 0.0
    ) -> StepResult:
        """One step; every rank calls it alike and gets the same ``action``."""
        self.judge.start_phase(planned.phase)
        entry = self.ledger.find(planned.phase, planned.first_sample, planned.first_sample + planned.batch_size)
        if entry is not None:
            return self._leave_out(planned, requests, entry)
        self.fp8.remember()
        gradients, updated = self.stepper.step(batches, requests, seconds, Limits(*self.judge.limits()))
        problem = self.judge.problem(gradients.loss, gradients.grad_norm)
        assert updated == (problem is None), f"the device and the host judge a step differently: {problem}"
        if problem is None:
            return self._accept(planned, batches, gradients)
        return self._bad_step(planned, batches, gradients, problem)

    def _accept(self, planned: PlannedStep, batches: list[MicroBatch], gradients: Gradients) -> StepResult:
        self.judge.accept(gradients.loss, gradients.grad_norm)
        self._good_batches = (planned.phase, batches)
        return result_of(gradients)

    def _bad_step(
        self, planned: PlannedStep, batches: list[MicroBatch], gradients: Gradients, problem: str
    ) -> StepResult:
        if self.runtime.is_logging_rank:
            logger.warning("step %d: %s; not applied, looking for the cause", self.state.step + 1, problem)
        diagnosis, again = self._diagnose(batches, planned.phase)
        event = {
            **self._about(planned),
            "problem": problem,
            "cause": diagnosis.kind,
            "loss": gradients.loss,
            "grad_norm": gradients.grad_norm,
            "loss_again": again.loss,
            "grad_norm_again": again.grad_norm,
            "num_runs": diagnosis.num_runs,
        }
        if diagnosis.kind == "transient":
            return self._apply_again(planned, batches, gradients, again, event)
        self.fp8.go_back()
        if diagnosis.culprits:
            event["culprits"] = self._name(planned, diagnosis)
        suspect = diagnosis.kind == "persistent"
        wanted = self.config.on_persistent if suspect else self.config.on_data
        what = f"step {self.state.step + 1}: {problem} ({diagnosis.kind}: {_in_words(event, diagnosis)})"
        return replace(self._act(planned, gradients, wanted, what, event), suspect=suspect)

    def _apply_again(
        self, planned: PlannedStep, batches: list[MicroBatch], first: Gradients, again: Gradients, event: dict[str, Any]
    ) -> StepResult:
        """The repetition is the step that should have been; its gradients are the latest in the buffers."""
        before, after = self.stepper.micro_batch_losses(first), self.stepper.micro_batch_losses(again)
        # NaN differs from itself, which is what is wanted here.
        differing = [rank for rank, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        event["data_parallel_ranks"] = differing
        where = f"in the forward pass of data-parallel rank {differing}" if differing else "in a backward pass"
        event |= {"action": "run again", "where": where}
        self.stepper.update(again)
        # Requests and seconds are those of the step's first run: the later ones carry none.
        accepted = self._accept(planned, batches, again)
        return replace(accepted, requests=first.requests, rank_seconds=first.rank_seconds, event=event)

    def _diagnose(self, batches: list[MicroBatch], phase: int) -> tuple[Diagnosis, Gradients]:
        runs: list[Gradients] = []
        rank, data_size = self.runtime.data_parallel_rank, self.runtime.data_parallel_size

        def is_good(some: list[MicroBatch]) -> bool:
            self.touch()
            self.fp8.go_back()
            runs.append(self.stepper.gradients(some))
            return self.judge.problem(runs[-1].loss, runs[-1].grad_norm) is None

        def without(places: frozenset) -> bool:
            return is_good([emptied(b) if (rank, number) in places else b for number, b in enumerate(batches)])

        control = None
        if self._good_batches is not None and self._good_batches[0] == phase:
            good = self._good_batches[1]
            # A batch-size ramp may have changed the number of micro-batches; any number of good ones will do.
            control = lambda: is_good(good)  # noqa: E731
        places = [(rank, number) for number in range(len(batches)) for rank in range(data_size)]
        diagnosis = diagnose(places, lambda: is_good(batches), control, without)
        return diagnosis, runs[0]

    def _act(
        self, planned: PlannedStep, gradients: Gradients, wanted: str, what: str, event: dict[str, Any]
    ) -> StepResult:
        if wanted == "rewind" and self.ledger.num_rewinds >= self.config.max_rewinds:
            wanted, what = "stop", f"{what}; the run went back {self.ledger.num_rewinds} times already"
        if wanted == "rewind":
            end = planned.first_sample + planned.batch_size
            begin = max(0, planned.first_sample - self.config.rewind_skip_steps * planned.batch_size)
            entry = LeftOut(planned.phase, begin, end, self.state.step + 1, event["problem"])
            self.ledger.add_rewind(entry, write=self.runtime.rank == 0)
            return self._result(gradients, "rewind", what, event)
        if wanted == "stop":
            return self._result(gradients, "stop", what, event)
        reason = self.judge.count_skip(self.state.step + 1)
        return self._result(gradients, "stop" if reason else "skipped", reason or what, event)

    def _leave_out(self, planned: PlannedStep, requests: tuple[int, ...], entry: LeftOut) -> StepResult:
        sums = self.stepper.exchange(requests)
        reason = f"samples {entry.begin}..{entry.end - 1} are left out since step {entry.step} ({entry.reason})"
        event = {**self._about(planned), "problem": reason, "action": "skipped"}
        return StepResult(float("nan"), float("nan"), 0, sums, "skipped", reason, event)

    def _about(self, planned: PlannedStep) -> dict[str, Any]:
        return {
            "guard": "numerics", "step": self.state.step + 1, "phase": planned.phase_name,
            "first_sample": planned.first_sample, "num_samples": planned.batch_size,
        }  # fmt: skip

    def _name(self, planned: PlannedStep, diagnosis: Diagnosis) -> list[dict[str, Any]]:
        named = []
        for place in diagnosis.culprits[:MOST_NAMED]:
            samples = samples_of(planned, self.runtime.data_parallel_size, place)
            named.append(
                {
                    "data_parallel_rank": place[0], "micro_batch": place[1],
                    "samples": name_samples(self.data, planned.phase, samples),
                }
            )  # fmt: skip
        return named

    @staticmethod
    def _result(g: Gradients, action: str, reason: str, event: dict[str, Any]) -> StepResult:
        event = {"action": action, **event}
        return StepResult(g.loss, g.grad_norm, g.num_labelled_tokens, g.requests, action, reason, event)


def _in_words(event: dict[str, Any], diagnosis: Diagnosis) -> str:
    if diagnosis.kind == "persistent":
        return "a batch that was good before comes out bad as well, or nothing else is good either"
    if not diagnosis.culprits:
        return f"samples {event['first_sample']}..{event['first_sample'] + event['num_samples'] - 1}, no few of them"
    return "; ".join(
        f"micro-batch {c['micro_batch']} of data-parallel rank {c['data_parallel_rank']}: "
        + ", ".join(f"sample {s['sample']} = {_documents(s)} of {s['source']} ({s['file']})" for s in c["samples"])
        for c in event["culprits"]
    )


def _documents(sample: dict[str, Any]) -> str:
    first, last = sample["first_document"], sample["last_document"]
    return f"document {first}" if first == last else f"documents {first}..{last}"
