"""One rank that trains a list of layouts in turn and writes what the tests compare.

torchrun --nproc-per-node N -m tests.distributed.worker DEVICE OUT_DIR MODEL/LAYOUT ...
"""

from __future__ import annotations

import gc
import sys
import time
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from hymba_train.evaluation.recall_trial import recall_sums
from hymba_train.evaluation.scoring import Task, batches
from hymba_train.evaluation.symbols import Symbols
from hymba_train.model import build_model_chunks
from hymba_train.parallel import create_groups, destroy_groups
from hymba_train.parallel.device import activate, backend
from hymba_train.train.main import seed_everything
from hymba_train.train.optimizer import build_optimizer, wrap_model
from hymba_train.train.schedules import set_hyperparameters
from hymba_train.train.step import Stepper
from tests.distributed.cases import (
    GLOBAL_BATCH_SIZE,
    LAYOUTS,
    NUM_STEPS,
    REORDERED,
    SEQ_LENGTH,
    WIDE_SEQ_LENGTH,
    Layout,
    config_of,
)


def batches_of_step(step: int, layout: Layout, model, rank: int, size: int) -> list[dict]:
    """A rank's micro-batches: random tokens out of 16, labels missing in uneven numbers."""
    g = torch.Generator().manual_seed(1000 + step)
    vocab_size, seq_length = model.vocab_size, WIDE_SEQ_LENGTH if model.name == "wide" else SEQ_LENGTH
    tokens = torch.randint(vocab_size - 16, vocab_size, (GLOBAL_BATCH_SIZE, seq_length + 1), generator=g)
    labels = tokens[:, 1:].clone()
    for row in range(GLOBAL_BATCH_SIZE):  # unequal counts: a mean of means would be wrong
        labels[row, : 3 * row] = -100
    batch = {"tokens": tokens[:, :-1].contiguous(), "labels": labels}
    if layout.document_mask:
        at = torch.arange(seq_length).expand(GLOBAL_BATCH_SIZE, -1)
        cut = torch.arange(GLOBAL_BATCH_SIZE).unsqueeze(1) * 4 + 2
        batch["segment_ids"] = (at >= cut).long()
        batch["positions"] = torch.where(at >= cut, at - cut, at)
    size_of = layout.micro_batch_size
    starts = range(rank * size_of, GLOBAL_BATCH_SIZE, size * size_of)
    return [{k: v[s : s + size_of] for k, v in batch.items()} for s in starts]


def recall_of(stepper: Stepper, vocab_size: int, layout: Layout, rank: int, size: int) -> list[float]:
    """Sums of two recall tasks, flat. Training saw the last 16 tokens alone: some answers are hit."""
    ids = np.arange(vocab_size)
    symbols = Symbols(ids[10:-16], ids[-16:], 1, 2, 3, 4, eod=0)
    tasks = [Task("copy", "selective_copy", 25, 6, 5, 1, symbols), Task("needle", "needle", 46, 2, 7, 1, symbols)]
    found = []
    for task in tasks:
        batches_of_rank = batches(task, layout.micro_batch_size, rank, size)
        found += [x for row in recall_sums(stepper, batches_of_rank, task.num_buckets) for x in row]
    return found


def chunk_ranges(config, layout: Layout) -> list[range]:
    num_chunks = config.parallel.pipeline * config.parallel.virtual_pipeline
    even = [config.model.num_layers // num_chunks] * num_chunks
    ends = [0, *accumulate(layout.chunks[config.model.name] if layout.chunks else even)]
    return [range(a, b) for a, b in pairwise(ends)]


def train(model_name: str, layout: Layout, device: torch.device) -> dict:
    """NUM_STEPS steps; -> losses, gradient norms, gathered parameters, and what must not have happened."""
    config = config_of(model_name, layout, device.type)
    runtime = create_groups(config.parallel, device)
    seed_everything(config.run.seed, deterministic=False)
    models = build_model_chunks(config, runtime, chunk_ranges(config, layout))
    chunks = wrap_model(config, runtime, models, layout.bucket_size)
    optimizer = build_optimizer(config, runtime, chunks)
    stepper = Stepper(runtime, chunks, optimizer)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        set_hyperparameters(optimizer.param_groups, config.optim.lr * (step + 1) / NUM_STEPS, config.optim.weight_decay)
        rank, size = runtime.data_parallel_rank, runtime.data_parallel_size
        result = stepper.train(batches_of_step(step, layout, config.model, rank, size))
        losses.append(result.loss)
        norms.append(result.grad_norm)
    held_out = stepper.evaluate(batches_of_step(99, layout, config.model, rank, size))
    # On a GPU every length of a sequence costs kernels that are compiled for it.
    recall = recall_of(stepper, config.model.vocab_size, layout, rank, size) if device.type == "cpu" else []
    parameters, faults = gather_parameters(models, chunks, runtime)
    destroy_groups()
    return {
        "losses": losses,
        "norms": norms,
        "held_out": held_out,
        "recall": recall,
        "parameters": parameters,
        "faults": faults,
    }


def gather_parameters(models, chunks, runtime) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Full true parameters by our names, and a line for each padding that is not zero and copy that differs."""
    for chunk in chunks:
        if chunk.use_forward_hook:
            chunk.disable_forward_pre_hook(param_sync=True)
    mine, faults = [], []
    for model in models:
        for name, param, description, cut in model.described_parameters():
            data = param.detach().cpu()
            if any(p.count_nonzero() for p in cut.padding(data)):
                faults.append(f"rank {runtime.rank}: padding of {name} is not zero")
            pieces = [(None, data.clone())]
            if cut.slices:
                pieces = [
                    ((description.axis, s.full_start + s.start, s.count),
                     data.narrow(description.axis, s.local_start, s.count).clone())
                    for s in cut.slices
                ]  # fmt: skip
            mine.append((name, description.shape, pieces))
    everyone = [None] * runtime.world_size
    dist.all_gather_object(everyone, mine)
    full: dict[str, torch.Tensor] = {}
    for entries in everyone:
        for name, shape, pieces in entries:
            whole = full.setdefault(name, torch.full(shape, torch.nan, dtype=pieces[0][1].dtype))
            for place, piece in pieces:
                target = whole if place is None else whole.narrow(*place)
                if not target.isnan().all() and not torch.equal(target, piece):
                    faults.append(f"copies of {name} differ by {(target - piece).abs().max():.2e}")
                target.copy_(piece)
    faults += [f"{name} has values that no rank holds" for name, whole in full.items() if whole.isnan().any()]
    return full, faults


def main(wanted_device: str, out: str, wanted: list[str]) -> None:
    torch.set_num_threads(1)
    device = activate(wanted_device)
    torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group(backend(device))  # NCCL's groups as they are used: every layout makes its own
    layouts = {layout.name: layout for layout in [*LAYOUTS, *REORDERED]}
    for name in wanted:
        model, layout = name.split("/")
        begin = time.monotonic()
        result = train(model, layouts[layout], device)
        if dist.get_rank() == 0:
            torch.save(result, Path(out) / f"{model}-{layout}.pt")
            print(f"{name}: {time.monotonic() - begin:.1f} s", flush=True)
        if device.type == "cuda":  # two ranks may share their GPUs with single ones
            gc.collect()
            torch.cuda.empty_cache()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
