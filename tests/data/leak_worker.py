"""The leak tests under parallel layouts, on gradients as the optimizer gets them: every rank compares its own part.

torchrun --nproc-per-node 2|4 -m tests.data.leak_worker OUT_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hymba_train.model import build_model_chunks
from hymba_train.parallel import create_groups, destroy_groups
from hymba_train.parallel.device import activate
from hymba_train.train.main import seed_everything
from hymba_train.train.optimizer import build_optimizer, wrap_model
from hymba_train.train.step import Stepper, forward_step
from tests.data.packed_documents import alone, config_of, documents, of_unchanged, pack

LAYOUTS = {
    2: {
        "tp2": dict(tensor=2),
        "tp2_sp": dict(tensor=2, sequence=True),
        "pp2": dict(pipeline=2),  # K/V that layer 1 computes are consumed by layer 2, on the next stage
        "pp2_vpp2": dict(pipeline=2, virtual_pipeline=2),
        "dp2": {},
        "dp2_overlap_recompute": dict(overlap_grad_reduce=True, recompute="full"),
        "dp2_distributed_optimizer": dict(
            distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
        ),
    },
    4: {
        "tp4": dict(tensor=4),
        "pp4": dict(pipeline=4),
        "tp2_pp2": dict(tensor=2, pipeline=2),
        "tp2_pp2_vpp2_sp": dict(tensor=2, pipeline=2, virtual_pipeline=2, sequence=True),
        "tp2_dp2_sp": dict(tensor=2, sequence=True),
        "pp2_dp2_recompute": dict(pipeline=2, recompute="full"),
    },
}
"""Processes -> layouts of that many."""


class Layout:
    """The packed-documents model under one layout."""

    def __init__(self, parallel: dict) -> None:
        config = config_of()
        for key, value in parallel.items():
            setattr(config.parallel, key, value)
        self.runtime = create_groups(config.parallel, torch.device("cpu"))
        seed_everything(config.run.seed, deterministic=False)
        num_chunks = config.parallel.pipeline * config.parallel.virtual_pipeline
        each = config.model.num_layers // num_chunks
        ranges = [range(i * each, (i + 1) * each) for i in range(num_chunks)]
        self.chunks = wrap_model(config, self.runtime, build_model_chunks(config, self.runtime, ranges))
        optimizer = build_optimizer(config, self.runtime, self.chunks)
        self.stepper = Stepper(self.runtime, self.chunks, optimizer)

    def run(self, batches: list[dict]) -> tuple[float, float, dict[str, torch.Tensor]]:
        """(summed loss, labelled tokens, this rank's gradient of the summed loss by parameter) of micro-batches.

        With a distributed optimizer a rank holds the gradient of all ranks for its own share of the parameters alone;
        of the others it holds its own rows'.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        # The interleaved schedule takes micro-batches in groups of the pipeline size; twice the batch is fair to all.
        outputs = self.stepper._run(batches * self.runtime.pipeline_size, False, forward_step)
        loss, tokens = self.stepper._reduce(outputs, ()).tolist()
        gradients = {
            f"{i}.{name}": p.main_grad.double()
            for i, chunk in enumerate(self.chunks)
            for name, p in chunk.named_parameters()
        }
        return loss, tokens, gradients


def rows_of_rank(batch: dict, runtime) -> dict:
    """Data-parallel rank r has row r."""
    if runtime.data_parallel_size == 1:
        return batch
    row = runtime.data_parallel_rank
    return {key: value[row : row + 1] for key, value in batch.items()}


def check_leak(layout: Layout) -> None:
    batches = [rows_of_rank(of_unchanged(pack(documents(changed))), layout.runtime) for changed in (False, True)]
    (loss, _, expected), (changed_loss, _, found) = (layout.run([batch]) for batch in batches)
    assert abs(loss - changed_loss) <= 1e-6 * loss, (loss, changed_loss)
    for name, gradient in expected.items():
        difference = (found[name] - gradient).abs().max()
        assert difference <= 1e-6 * max(1, gradient.abs().max()), (name, difference)


def check_one_by_one(layout: Layout) -> None:
    loss, tokens, gradients = layout.run([rows_of_rank(pack(documents()), layout.runtime)])
    total_loss = total_tokens = 0.0
    sums = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
    for row in documents():
        for document in row:
            if len(document) > 1:
                # Under data parallelism both ranks have the document: the sums count it twice.
                single_loss, single_tokens, single = layout.run([alone(document)])
                share = 1 / layout.runtime.data_parallel_size
                total_loss, total_tokens = total_loss + share * single_loss, total_tokens + share * single_tokens
                for name, gradient in single.items():
                    sums[name] += share * gradient
    assert tokens == total_tokens
    assert abs(loss - total_loss) <= 1e-6 * loss, (loss, total_loss)
    for name, gradient in gradients.items():
        scale = max(1, sums[name].abs().max())
        assert (gradient - sums[name]).abs().max() <= 1e-5 * scale, name


def main(out: str) -> None:
    torch.set_num_threads(1)
    activate("cpu")
    dist.init_process_group("gloo")
    for name, parallel in LAYOUTS[dist.get_world_size()].items():
        layout = Layout(parallel)
        check_leak(layout)
        if not parallel.get("distributed_optimizer"):
            check_one_by_one(layout)
        destroy_groups()
        if dist.get_rank() == 0:
            with open(Path(out) / "done.txt", "a", encoding="utf-8") as stream:
                stream.write(f"{name}\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
