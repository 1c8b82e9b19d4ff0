"""Counts what autograd really keeps: builds layers as one rank would, runs them forward under saved_tensors_hooks.

python -m tests.describe.saved_bytes CASE...      a CASE is JSON; prints RESULT and one list of [bytes, where] a case

{"overrides": [...], "layer": 1, "batch": 2, "seq": 256, "device": "meta", "documents": false}

``layer`` is a number, "head" or "all"; ``device`` meta, cpu or cuda (the same for all cases, or none of them cuda).

On the meta device nothing is computed, so that the 1.5B takes no time. Ranks of a layout are imagined: the process
group is a fake one, in which this is the last rank.
"""

from __future__ import annotations

import json
import sys
import traceback

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from hymba_train.config import compose
from hymba_train.describe.heads import heads_of_rank
from hymba_train.model import build_model_chunks
from hymba_train.model.rows import BatchContext, TokenRows, num_token_rows
from hymba_train.parallel import create_groups, destroy_groups
from hymba_train.parallel.device import activate


class Counter:
    """Storages that are saved while it is entered, but for parameters and what ``known`` holds already."""

    def __init__(self, known: list[torch.Tensor], skip_file: str | None = None) -> None:
        self.known = {t.untyped_storage()._cdata for t in known}
        self.found: dict[int, tuple[int, str]] = {}
        self.alive: list[torch.Tensor] = []  # or a storage's address might be used again
        self.skip_file = skip_file

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known and storage._cdata not in self.found:
            frames = traceback.extract_stack()
            if self.skip_file is None or not any(f.filename.endswith(self.skip_file) for f in frames):
                self.alive.append(tensor.detach())
                ours = [f for f in frames if "/hymba_train/" in f.filename]
                where = f"{tuple(tensor.shape)} {tensor.dtype} {ours[-1].name}:{ours[-1].lineno}"
                self.found[storage._cdata] = (storage.nbytes(), where)
        return tensor

    def __enter__(self) -> Counter:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.hooks.__exit__(*error)


def measure(case: dict) -> list[tuple[int, str]]:
    """(bytes, where) of every storage that one layer, or all but the layers, saves."""
    kind = "cuda" if case["device"] == "cuda" else "cpu"
    config = compose(
        [*case["overrides"], f"run.device={kind}", "precision.layer_spec=local", "parallel.world_size=null"]
    )
    tensor, batch, seq = config.parallel.tensor, case["batch"], case["seq"]
    dist.init_process_group("fake", rank=tensor - 1, world_size=tensor, store=FakeStore())
    try:
        runtime = create_groups(config.parallel, torch.device(kind))
        device = torch.device(case["device"])
        (model,) = build_model_chunks(config, runtime, [range(config.model.num_layers)], device=device)
        held = [*model.parameters(), *model.buffers()]
        ids = torch.zeros(batch, seq, dtype=torch.long, device=device)
        segments = torch.arange(seq).div(40, rounding_mode="floor").expand(batch, seq) if case["documents"] else None
        if segments is not None and kind == "cuda":
            segments = segments.to(device)
        if case["layer"] in ("head", "all"):
            with Counter([*held, ids], "/hymba_train/model/stack.py" if case["layer"] == "head" else None) as counter:
                model(ids, labels=ids, segment_ids=segments)
            return list(counter.found.values())
        d, dtype = model.config.dims, model.config.params_dtype
        multiple = tensor if config.parallel.sequence else 1
        rows = TokenRows(d.num_meta_tokens, batch, seq, num_token_rows(d.num_meta_tokens, batch, seq, multiple))
        inputs = BatchContext.of(rows, None, segments, None, d.head_dim, 10000.0, d.conv_width - 1, device)
        layer = model.decoder.layers[case["layer"]]

        def stream(num_rows: int, width: int) -> torch.Tensor:
            return torch.randn(num_rows, 1, width, dtype=dtype, device=device).requires_grad_()

        kv = []
        if layer.layer.kv_role == "consumer":
            groups = len(heads_of_rank(d, tensor, tensor - 1).kv_heads)
            kv = [stream(rows.num_rows, groups * width) for width in (d.head_dim, d.value_head_dim)]
        known = [*held, *kv, inputs.cos, inputs.sin, inputs.reach, *([] if segments is None else [segments])]
        with Counter(known) as counter:
            layer(stream(rows.num_rows // multiple, d.hidden_size), inputs, *kv)
        return list(counter.found.values())
    finally:
        destroy_groups()
        dist.destroy_process_group()


if __name__ == "__main__":
    cases = [json.loads(argument) for argument in sys.argv[1:]]
    activate("cuda" if cases[0]["device"] == "cuda" else "cpu")  # for the whole process
    torch.manual_seed(0)
    print("RESULT" + json.dumps([measure(case) for case in cases]))
