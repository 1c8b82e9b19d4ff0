"""Runs of tests.train.tiny_run in which numbers, ranks or replicas go wrong.

::

    python -m tests.reliability.guarded_run DIRECTORY key=value ... [then key=value ...]

Beside the settings of a run these keys choose its fault:

    fault.kind      what happens, see below
    fault.step      in the step of this number (1 is the first)
    fault.rank      on this rank (default 0)
    fault.sample    the bad sample, a number within its phase
    fault.factor    what losses are multiplied by (default NaN)

Kinds: ``transient`` one loss of the step, the first time it is computed; ``persistent`` all losses from that step on;
``sample`` the loss of the micro-batch that holds the sample, whenever it is trained on; ``bit`` flips a bit of a
parameter (fault.parameter), ``moment`` one of an optimizer state; ``stop`` SIGSTOP, ``loop`` an endless loop, ``gil`` a
call that never lets go of the interpreter, ``loader`` data that never come, ``exit`` SIGKILL at every start.
Each fault but ``sample`` and ``exit`` happens once a run, over all restarts. Exit codes of the runs are printed.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from hymba_train.callbacks.base import Callback
from tests.reliability.faulty_run import take_unfinished

RANK = int(os.environ.get("RANK", 0))
DEFAULTS = {"kind": None, "step": 0, "rank": 0, "sample": None, "factor": math.nan, "parameter": "", "forever": False}


class Fault(Callback):
    """First in the list of callbacks: a step's fault is there before anybody looks at the step."""

    def __init__(self, fault: SimpleNamespace, marker: Path) -> None:
        self.fault, self.marker = SimpleNamespace(**{**DEFAULTS, **vars(fault)}), marker
        self.labels = None  # of the bad sample
        self.models: list = []
        self.optimizer = None

    @property
    def here(self) -> bool:
        return self.fault.rank == RANK

    def once(self) -> bool:
        if self.marker.exists() and not self.fault.forever:
            return False
        self.marker.touch()
        return True

    def on_step_start(self, loop) -> None:
        self.step = loop.state.step + 1
        if self.step == self.fault.step and self.here and self.fault.kind == "exit":
            os.kill(os.getpid(), signal.SIGKILL)

    def on_batch_loaded(self, loop) -> None:
        kind = self.fault.kind
        if self.step != self.fault.step or not self.here or kind not in ("stop", "loop", "gil") or not self.once():
            return
        if kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        while kind == "loop":
            math.sqrt(2.0)
        if kind == "gil":
            ctypes.PyDLL(None).sleep(3600)  # PyDLL: calls without releasing the GIL

    def on_step_end(self, loop, metrics) -> None:
        if metrics.step != self.fault.step or not self.here or self.fault.kind not in ("bit", "moment"):
            return
        if self.once():
            flip(self.models, self.optimizer, self.fault)

    def factor(self, labels) -> float:
        """What the loss of a micro-batch is multiplied by."""
        f = self.fault
        if f.kind == "sample" and self.labels is not None:
            return f.factor if (labels == self.labels.to(labels.device)).all(-1).any() else 1.0
        if f.kind == "transient" and self.here and self.step == f.step and self.once():
            return f.factor
        return f.factor if f.kind == "persistent" and self.step >= f.step else 1.0


def flip(models: list, optimizer, fault: SimpleNamespace) -> None:
    """Flip the lowest bit of one value; of a moment a higher one, since the next step would round the lowest away."""
    import torch

    (param,) = (p for model in models for name, p in model.named_parameters() if name == fault.parameter)
    value = param.data
    if fault.kind == "moment":
        value = optimizer.optimizer.state[getattr(param, "main_param", param)]["exp_avg"]
    bits = value.view(torch.int16 if value.element_size() == 2 else torch.int32).view(-1)
    bits[3] ^= 1 << (20 if fault.kind == "moment" else 0)


def main() -> int:
    import torch

    import tests.train.tiny_run as tiny_run
    from hymba_train.errors import UserError
    from hymba_train.train import feed as feeds
    from hymba_train.train import main as training
    from hymba_train.train import step as steps

    current = SimpleNamespace(fault=None)
    plain = {
        "sum_of_losses": steps.sum_of_losses, "build_callbacks": training.build_callbacks,
        "build_training_data": training.build_training_data, "build_model_chunks": training.build_model_chunks,
        "build_optimizer": training.build_optimizer, "micro_batches": feeds.micro_batches, "train": training.train,
    }  # fmt: skip

    def sum_of_losses(labels, losses):
        return plain["sum_of_losses"](labels, losses * current.fault.factor(labels))

    def build_training_data(*args, **kwargs):
        data = plain["build_training_data"](*args, **kwargs)
        if current.fault.fault.sample is not None:
            current.fault.labels = torch.from_numpy(data.sample(0, current.fault.fault.sample)["labels"].copy())
        return data

    def micro_batches(data, phase, first_sample, **kwargs):
        fault, number = current.fault.fault, first_sample // kwargs["global_batch_size"] + 1
        if fault.kind == "loader" and number == fault.step and current.fault.here and current.fault.once():
            time.sleep(3600)
        return plain["micro_batches"](data, phase, first_sample, **kwargs)

    def build_model_chunks(*args, **kwargs):
        current.fault.models = plain["build_model_chunks"](*args, **kwargs)
        return current.fault.models

    def build_optimizer(*args, **kwargs):
        current.fault.optimizer = plain["build_optimizer"](*args, **kwargs)
        return current.fault.optimizer

    def train(config, plan):
        current.fault = faults[config.run.name]
        code = 2
        try:
            code = plain["train"](config, plan)
        except UserError as error:
            print(f"UserError: {error}", flush=True)
            raise
        finally:
            print(f"rank {RANK} of {config.run.name}: exit code {code}", flush=True)
        if code not in (0, 75) and os.environ.get("TORCHELASTIC_RUN_ID"):
            sys.exit(code)
        return code

    faults = {name: Fault(fault, Path(sys.argv[1]) / f"{name}.happened") for name, fault in take_unfinished().items()}
    if not faults:
        return 0
    steps.sum_of_losses, training.train = sum_of_losses, train
    training.build_callbacks = lambda *args, **kwargs: [current.fault, *plain["build_callbacks"](*args, **kwargs)]
    training.build_training_data, feeds.micro_batches = build_training_data, micro_batches
    training.build_model_chunks, training.build_optimizer = build_model_chunks, build_optimizer
    return tiny_run.main()


if __name__ == "__main__":
    sys.exit(main())
