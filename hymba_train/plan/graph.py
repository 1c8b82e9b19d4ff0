"""What run.cuda_graph asks of the other keys: the kernels of a step must be the same ones every time."""

from __future__ import annotations

from hymba_train.config.schema import Config

CUDNN_LENGTHS = 128
"""Its backward pass pads other lengths with a mask where cuDNN is older than 9.15.1 or its frontend than 1.16."""


def check_cuda_graph(config: Config, data_parallel: int | None) -> list[str]:
    """One line a problem. data_parallel: ranks that train the same model; None: not known."""
    if not config.run.cuda_graph:
        return []
    p, fp8, run, problems = config.parallel, config.precision.fp8, config.run, []
    if run.device == "cpu":
        return ["run.cuda_graph=true needs a GPU, run.device is cpu; set run.cuda_graph=false"]
    if p.pipeline > 1:
        problems.append(f"parallel.pipeline={p.pipeline}: stages exchange messages; set parallel.pipeline=1")
    if p.tensor > 1:
        problems.append(f"parallel.tensor={p.tensor}: tensor parallelism is not supported yet; set parallel.tensor=1")
    if (data_parallel or 1) > 1:
        problems.append(f"{data_parallel} data-parallel ranks: it was never run on several GPUs; start one process")
    if run.deterministic and config.precision.attention_backend in ("auto", "cudnn"):
        problems.append(
            f"run.deterministic=true and precision.attention_backend={config.precision.attention_backend}: replaying "
            "cuDNN's attention crashed in a deterministic run, the cause is not known; set run.deterministic=false"
        )
    if config.precision.attention_backend in ("auto", "cudnn"):
        problems += [
            f"{key}={length}: where this is no multiple of {CUDNN_LENGTHS}, cuDNN's frontend may copy from memory of "
            "the host that is gone when the copy is replayed; set precision.attention_backend=torch"
            for key, length in _lengths(config) if length % CUDNN_LENGTHS
        ]  # fmt: skip
    elif config.precision.attention_backend == "flex":
        problems.append("precision.attention_backend=flex was never recorded; set precision.attention_backend=cudnn")
    if config.model.branch_fusion == "concat":
        problems.append("model.branch_fusion=concat: its norm makes tensors of numbers of the host; set it to mean")
    if any(layer.startswith("mamba2") for layer in config.model.layer_pattern):
        problems.append("model.layer_pattern with mamba2, which was never recorded; take other mixers")
    if p.recompute != "none":
        problems.append(
            f"parallel.recompute={p.recompute}: the host puts random states back; set parallel.recompute=none"
        )
    if fp8 not in (None, "delayed"):
        problems.append(f"precision.fp8={fp8} is not supported yet; set precision.fp8=delayed, or null")
    if run.objective != "pretrain":
        return [*_named(problems), f"run.cuda_graph=true with run.objective={run.objective}: documents are of many "
                "lengths; set run.cuda_graph=false"]  # fmt: skip
    if config.data.document_mask:
        problems.append("data.document_mask=true: documents are of many lengths; set data.document_mask=false")
    return _named(problems)


def _lengths(config: Config) -> list[tuple[str, int]]:
    """(key, tokens) of all that attention is computed over; the meta tokens attend to each other alone."""
    phases = [(f"data.phases.{name}.seq_length", phase.seq_length) for name, phase in config.data.phases.items()]
    return [*phases, ("model.num_meta_tokens", config.model.num_meta_tokens)]


def _named(problems: list[str]) -> list[str]:
    return [f"run.cuda_graph=true with {line}, or run.cuda_graph=false" for line in problems]
