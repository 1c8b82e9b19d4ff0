"""README.md of an export: what the model is, how it was trained, how to load it."""

from __future__ import annotations

from pathlib import Path

from hymba_train import __version__
from hymba_train.convert.source import TrainingCheckpoint
from hymba_train.describe import model_tensors

_LOAD = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
model = AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)
inputs = tokenizer(["Once upon a time", "The"], return_tensors="pt", padding=True)
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=40), skip_special_tokens=True))
```

`modeling_hymba.py` and `configuration_hymba.py` are plain PyTorch and need transformers 4.50 or newer (5 included).
Batches may be padded on either side. On a CUDA device prompts use FlexAttention, and mamba-ssm where it is installed;
decoding runs as a CUDA graph (`decode_backend` in config.json: auto, graph, compile, eager).

`decode_window`: local layers see {window} in training and prefill. Decoding with a cache does the same ("training", the
default), so that cached and uncached generation agree. The published Hymba code sees one key fewer when it decodes:
"published" does that.
"""


def model_card(
    source: TrainingCheckpoint, dtype: str, *, has_tokenizer: bool, license_id: str | None, files: list[str]
) -> str:
    """Markdown with the YAML header that the Hub reads. ``license_id`` None: that of the weights that
    it goes back to, else "unknown"."""
    config, state, model = source.config, source.metadata["train_state"], source.config.model
    license_id = license_id or (source.origin or {}).get("license") or "unknown"
    num_parameters = sum(t.num_parameters for t in model_tensors(model))
    header = [
        "---", f"license: {license_id}", "library_name: transformers", "pipeline_tag: text-generation",
        "tags:", "- hymba", "- hybrid", "- mamba", "---",
    ]  # fmt: skip
    lines = [*header, "", f"# {config.run.name if config.data.phases else model.name}", ""]
    lines += [
        f"Hymba language model, {num_parameters:,} parameters: {model.num_layers} layers, hidden size "
        f"{model.hidden_size}, {model.num_attention_heads} query and {model.num_query_groups} key/value heads, "
        f"{model.num_meta_tokens} meta tokens, vocabulary {model.vocab_size}. Weights are {dtype}; A_log, D and the "
        f"time-step bias are float32 where that matters. Written by hymba_train {__version__} "
        f"from step {state['step']:,}.",
        "",
    ]
    lines += _training(source)
    if not has_tokenizer:
        lines += ["", "**There is no tokenizer in this directory**: the checkpoint it was made from came without one."]
    window = "everything" if model.window_size is None else f"{model.window_size + 1:,} keys and all meta tokens"
    lines += ["", _LOAD.format(window=window)]
    return "\n".join(lines)


def _training(source: TrainingCheckpoint) -> list[str]:
    config, state = source.config, source.metadata["train_state"]
    lines = ["## Training", ""]
    if source.origin is not None:
        licence = source.origin["license"] or "not stated"
        since = "; not trained since" if source.is_imported else ""
        lines.append(f"- Weights imported from {source.origin['source']}, licence there: {licence}{since}.")
        if source.is_imported:
            return lines
    if config.checkpoint.load:  # its name alone: where it lay is nobody's business
        lines.append(f"- Started from a checkpoint of {Path(config.checkpoint.load).name}.")
    if config.run.objective != "pretrain":
        what = {"sft": "Fine-tuned on the answers of conversations", "dpo": "Trained on preference pairs (DPO)"}
        lines.append(f"- {what[config.run.objective]}; prompts: `tokenizer.apply_chat_template`.")
    for number, (name, phase) in enumerate(config.data.phases.items()):
        if number > state["phase"]:
            break
        tokens = phase.tokens if number < state["phase"] else state["samples_in_phase"] * phase.seq_length
        total = sum(phase.blend.values()) or 1
        blend = ", ".join(f"{source} {weight / total:.1%}" for source, weight in phase.blend.items())
        lines.append(
            f"- Phase {name}: {tokens:,} text tokens in sequences of {phase.seq_length:,}, batch "
            f"{phase.global_batch_size:,}, RoPE {phase.rope_type or config.model.rope_type}; data: {blend}."
        )
    o, s, precision = config.optim, config.schedule, config.precision.params
    if config.precision.fp8:
        precision += f", FP8 {config.precision.fp8}"
    layout = ", ".join(f"{key} {value}" for key, value in source.metadata["layout"].items())
    versions = ", ".join(f"{key} {value}" for key, value in source.metadata.get("versions", {}).items())
    lines += [
        f"- {state['tokens']:,} text tokens in {state['step']:,} steps in all; seed {config.run.seed}.",
        f"- {o.name}, learning rate {o.lr:g} to {o.min_lr:g} ({s.lr_decay_style}), weight decay {o.weight_decay:g}, "
        f"clip {o.clip_grad:g}; {precision}.",
        f"- Layout: {layout}. Versions: {versions}.",
    ]
    return lines
