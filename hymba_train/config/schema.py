"""The whole configuration of a run, typed.

One dataclass a group of ``recipes/``; the string under a field is its documentation (``hymba train --help-keys``).
Keys carry Megatron-Core's name where it has one. Values come from YAML; this file holds types, meanings and the
defaults that are safe for every run. Nothing here imports torch.

A value of ``"???"`` (:data:`TO_BE_GIVEN`) is one that only the user knows: ``plan`` lists it, ``train`` refuses it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TO_BE_GIVEN: Any = "???"  # stands in for a value of every type


@dataclass
class ModelConfig:
    name: str = TO_BE_GIVEN
    """Name of the recipe, for logs and exported files."""
    num_layers: int = TO_BE_GIVEN
    """Number of layers L, all stages together."""
    hidden_size: int = TO_BE_GIVEN
    """Width D of the residual stream."""
    ffn_hidden_size: int = TO_BE_GIVEN
    """Width F of the gated FFN."""
    num_attention_heads: int = TO_BE_GIVEN
    """Query heads H; tensor parallelism deals them, and each with 1/H of the channels of a Mamba-1 branch."""
    num_query_groups: int = TO_BE_GIVEN
    """Key/value heads G (grouped-query attention)."""
    kv_channels: int | None = None
    """Width of a head's queries and keys. None: hidden_size / H."""
    v_head_dim: int | None = None
    """Width of a head's values. None: mamba_expand * hidden_size / H, which makes a hybrid layer's branches equally
    wide, as Hymba's are."""
    vocab_size: int = TO_BE_GIVEN
    """Tokens V in the tokenizer. Padding for the hardware is internal: make_vocab_size_divisible_by."""
    layer_pattern: list[str] = field(default_factory=lambda: ["hybrid"])
    """Mixers, repeated over the layers: hybrid (attention and Mamba-1 side by side) | attention | ssm (Mamba-1) |
    mamba2; ':no_ffn' after one leaves out its FFN."""
    branch_fusion: str = "mean"
    """mean | concat: what a hybrid layer makes of its two normed branches. concat: both go side by side into out_proj,
    which is as wide as both together; they need not be equally wide then."""
    global_layers: list[int] = field(default_factory=list)
    """0-based layers whose attention sees everything; all others see window_size + 1 keys and the meta tokens."""
    kv_groups: list[list[int]] = field(default_factory=list)
    """Layers that share keys and values; the first of each list computes them, the others consume them."""
    window_size: int | None = None
    """Distance W to the furthest key a local layer sees (W + 1 keys with itself). None: every layer is global."""
    num_meta_tokens: int = 128
    """Learned tokens M in front of every document."""
    mamba_expand: int = 2
    """Inner width E = mamba_expand * hidden_size, of the SSM branch and of the attention values."""
    mamba_state_dim: int = 16
    """State size N per channel of Mamba-1."""
    mamba_conv_width: int = 4
    """Taps of the causal convolution."""
    mamba_dt_rank: int | None = None
    """Rank R of the time-step projection of Mamba-1. None: ceil(hidden_size / 16)."""
    mamba2_state_dim: int = 128
    """State size per channel of a mamba2 layer."""
    mamba2_head_dim: int = 64
    """Channels of a mamba2 layer that share a time step; it has mamba_expand * hidden_size / this many heads."""
    mamba2_num_groups: int = 1
    """Groups of heads of a mamba2 layer that share B and C."""
    rotary_base: float = 10000.0
    """RoPE base before scaling."""
    rope_type: str = "default"
    """default | ntk (static NTK-aware base, hymba-architecture 2.6). A phase may set its own."""
    max_position_embeddings: int = 2048
    """Longest sequence the model is meant for; ntk scales towards it."""
    rope_original_max_positions: int = 2048
    """Longest sequence before the extension; ntk scales from it."""
    layernorm_epsilon: float = 1e-6
    """Epsilon of every RMSNorm."""
    untie_embeddings_and_output_weights: bool = False
    """True: the output layer has weights of its own."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size; the padding never leaves."""
    init_method: str = "mamba"
    """mamba: dt bias log-uniform in 1e-3..1e-1, meta tokens at the embedding's scale, output projections scaled by
    1/sqrt(2L). published: what the released code does (hymba-architecture 4.3)."""
    init_method_std: float = 0.02
    """Standard deviation of the normal initialisation."""


@dataclass
class ParallelConfig:
    tensor: int = 1
    """Tensor-parallel ranks; heads are padded to a multiple."""
    pipeline: int = 1
    """Pipeline stages."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline stage (interleaved schedule when > 1)."""
    context: int = 1
    """Context-parallel ranks; only 1 is supported yet."""
    world_size: int | None = None
    """Processes (GPUs) the layout is meant for; a run with another number is refused. None: as many as are started."""
    sequence: bool = False
    """Sequence parallelism: norms and residuals split over the tensor-parallel ranks."""
    pipeline_layout: list[int] | None = None
    """Layers per model chunk, in the order of the layers. None: the planner balances the stages."""
    distributed_optimizer: bool = False
    """Optimizer state split over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs; needs distributed_optimizer."""
    recompute: str = "none"
    """none | full: activations of every layer are recomputed in the backward pass."""


@dataclass
class PrecisionConfig:
    params: str = "bf16"
    """float32 | bf16: type of weights and activations. The optimizer keeps float32 master weights."""
    fp8: str | None = None
    """None | delayed | tensorwise | blockwise | mxfp8: Transformer Engine recipe, named as in Megatron-Core, for
    in_proj, out_proj and the FFN; x_proj, dt_proj, replicated K/V and the output layer stay in bf16."""
    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in float32."""
    layer_spec: str = "auto"
    """local | transformer_engine | auto (transformer_engine for bf16 on a GPU, else local)."""
    attention_backend: str = "auto"
    """Backend of hymba_train.ops.attention; auto takes the fastest one this machine has, and prints it."""
    scan_backend: str = "auto"
    """Backend of hymba_train.ops.selective_scan."""
    ssd_backend: str = "auto"
    """Backend of hymba_train.ops.ssd_scan (mamba2 layers)."""
    conv_backend: str = "auto"
    """Backend of hymba_train.ops.causal_conv."""
    norm_backend: str = "auto"
    """Backend of the RMSNorms: hymba_train.ops.rms_norm, also fused with the residual add, and normed_average."""
    swiglu_backend: str = "auto"
    """Backend of hymba_train.ops.swiglu."""
    rope_backend: str = "auto"
    """Backend of hymba_train.ops.rope.rotate_heads."""
    loss_backend: str = "auto"
    """Backend of hymba_train.ops.cross_entropy; with parallel.tensor > 1 the loss is Megatron-Core's."""


@dataclass
class OptimConfig:
    name: str = "adamw"
    """adamw is the only optimizer yet."""
    lr: float = 3e-3
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices. Norms, biases, A_log, D, dt bias, conv and meta tokens have none."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 leaves gradients alone."""
    dpo_beta: float = 0.1
    """run.objective=dpo: how strongly the model is held to the one it starts from."""


@dataclass
class ScheduleConfig:
    lr_decay_style: str = "wsd"
    """wsd | cosine | linear | constant."""
    lr_warmup_fraction: float = 0.01
    """Share of all tokens over which the rate rises from 0 to optim.lr."""
    lr_wsd_decay_fraction: float = 0.2
    """Share of all tokens, at the end, over which wsd decays to optim.min_lr."""
    lr_wsd_decay_style: str = "linear"
    """linear | cosine | exponential | minus_sqrt: shape of the final decay of wsd."""


@dataclass
class SourceConfig:
    path: str = TO_BE_GIVEN
    """Prefix of a .bin/.idx pair that `hymba data tokenize` wrote, or a URL of one (s3://..., gs://...): data.cache."""
    validation_fraction: float = 0.0
    """Share of this source's tokens (its last documents) held out as a validation domain of the same name."""


@dataclass
class PhaseConfig:
    tokens: int = TO_BE_GIVEN
    """Length of the phase in text tokens (meta tokens are not counted). With epochs it follows from the files of
    `hymba data pack`."""
    epochs: int | None = None
    """Instead of tokens: train every packed sequence of every source in the blend so many times, whatever the weights.
    Rows that a last batch lacks carry no loss."""
    seq_length: int = TO_BE_GIVEN
    """Text tokens S in a sequence."""
    global_batch_size: int = TO_BE_GIVEN
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int = 1
    """Sequences per forward pass of one rank."""
    rampup_batch_size: list[int] | None = None
    """[start, increment, tokens]: batch size grows by increment from start to global_batch_size over these tokens."""
    blend: dict[str, float] = field(default_factory=dict)
    """Source name -> weight; weights are normalised. In a recipe or an override also the name of one of data.blends."""
    packing: str = "concat"
    """concat (windows over the documents end to end) | best_fit (whole documents, few cut) | length_buckets (best fit
    among documents of like length: for long sequences). The latter two need `hymba data pack` once."""
    min_document_tokens: int = 0
    """With best_fit or length_buckets: leave out shorter documents in this phase."""
    rope_type: str | None = None
    """RoPE scaling of this phase; None: model.rope_type."""

    def tokens_of(self, num_samples: int) -> int:
        """Text tokens of the full batches that hold ``num_samples`` sequences."""
        return -(-num_samples // self.global_batch_size) * self.global_batch_size * self.seq_length

    @property
    def pack_suffix(self) -> str | None:
        """What follows a source's prefix in the name of the file that `hymba data pack` makes for this phase."""
        if self.packing == "concat":
            return None
        shortest = f"-min{self.min_document_tokens}" if self.min_document_tokens else ""
        return f".{self.packing}-{self.seq_length}{shortest}.pack"


@dataclass
class DataConfig:
    tokenizer: str = TO_BE_GIVEN
    """Directory with tokenizer.json (Hugging Face tokenizers) or a SentencePiece .model file."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Name -> tokenised source."""
    blends: dict[str, dict[str, float]] = field(default_factory=dict)
    """Name -> source name -> weight: blends that several phases refer to by name."""
    phases: dict[str, PhaseConfig] = field(default_factory=dict)
    """Name -> phase, in the order in which they are trained."""
    validation_sequences: int = 64
    """Sequences per validation domain and evaluation."""
    document_mask: bool = True
    """Keep documents packed in one sequence apart in attention, scan, convolution, positions and loss."""
    path: str | None = None
    """Directory or URL that a relative sources.*.path and tokenizer start from. None: the working directory."""
    cache: str | None = None
    """Directory on a local disk for copies of what URLs name; needed with them."""


@dataclass
class CheckpointConfig:
    enabled: bool = True
    """False: write none at all, for runs that only measure."""
    save_interval: int = 1000
    """Steps between checkpoints; 0 saves only at the end."""
    async_save: bool = True
    """Write in the background while training goes on."""
    keep_last: int = 3
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Additionally keep the checkpoints of every n-th step; 0: none."""
    load: str | None = None
    """Run or step directory to start from when the run directory has no checkpoint yet."""
    load_optimizer: bool = True
    """With load: take optimizer, schedule, RNG and data position as well; false takes the weights alone."""
    export_interval: int | None = None
    """Export to Hugging Face format into the run's hf/, in the background: the first checkpoint at or after every n-th
    step, and the last one when training has come to its end; 0: the last one alone; null: none."""
    export_dtype: str | None = None
    """bfloat16 | float32: type of exported weights; null: what the run trains in."""
    accept_changed_data: bool = False
    """Go on although tokenizer, seed, files or blend are no longer those of the checkpoint; recorded in later ones."""


@dataclass
class LoggingConfig:
    log_interval: int = 10
    """Steps between lines."""
    eval_interval: int = 1000
    """Steps between evaluations; 0: only at the end."""
    tensorboard: bool = True
    """Write TensorBoard events into the run directory."""
    wandb: bool = False
    """Log to Weights & Biases; offline when there is no WANDB_API_KEY."""
    wandb_project: str = "hymba"
    """Project name there."""
    wandb_entity: str | None = None
    """User or team there."""
    profile: str | None = None
    """'START:END': profile these steps and write a Chrome trace and a table of parts."""
    batch_hash: bool = False
    """Log a hash of every logged step's tokens: equal for equal batches, under every layout. Reads the data twice."""


@dataclass
class GuardsConfig:
    numerics: bool = True
    """Watch loss and gradient norm of every step; a bad one is never applied, and is run again to find out why."""
    on_data: str = "skip"
    """skip | rewind | stop: what to do when the batch is the cause. rewind: go back to a checkpoint, leave it out."""
    on_persistent: str = "rewind"
    """skip | rewind | stop: what to do when a good batch comes out bad as well."""
    window_steps: int = 128
    """Accepted steps by whose median and median deviation the next one is judged; part of checkpoints."""
    min_window_steps: int = 32
    """Before so many accepted steps (in a phase) only values that are not finite count as bad."""
    spike_sigmas: float = 10.0
    """A spike is so many robust standard deviations above the median, and beyond the next two keys as well."""
    loss_spike_nats: float = 1.0
    """Least distance from the median of a loss spike, in nats per token."""
    grad_spike_ratio: float = 10.0
    """Least ratio to the median of a gradient-norm spike (norm before clipping)."""
    max_skips: int = 10
    """More skipped steps than this within skip_window_steps end the run; without numerics, more in a row."""
    skip_window_steps: int = 1000
    """Steps over which max_skips counts."""
    max_rewinds: int = 3
    """More rewinds than this end the run; counted in the run directory, over all restarts."""
    rewind_skip_steps: int = 0
    """A rewind leaves out so many steps before the bad one, too."""
    drift_interval: int = 500
    """Steps between comparisons of replicated parameters over the ranks (before every checkpoint, too); 0: never."""
    hang_seconds: float | None = 300.0
    """A step or a load of data that takes longer is a hang: the guilty ranks are named, all stacks written, the ranks
    ended with exit code 77. None: no watchdog."""
    hang_slow_seconds: float = 1800.0
    """The same for start-up, the first step, evaluation and checkpoints."""
    straggler_ratio: float | None = 1.3
    """Name ranks whose own time a step is so many times the median of all ranks. None: do not look."""
    max_starts_without_progress: int = 5
    """So many starts in a row from the same step, and the next one gives up (launchers count for themselves, too)."""


@dataclass
class RecallTaskConfig:
    kind: str = TO_BE_GIVEN
    """mqar | phonebook | needle | selective_copy (docs/evaluation.md)."""
    length: int = TO_BE_GIVEN
    """Tokens of a sample, its end-of-document token included."""
    items: int | None = None
    """Pairs, entries, needles or tokens to remember. None: length / 8, length / 16, 4 and 16, as far as they fit."""
    num_samples: int = 64
    """Samples in an evaluation, always the same ones."""


@dataclass
class EvaluationConfig:
    recall: dict[str, RecallTaskConfig] = field(default_factory=dict)
    """Name -> synthetic recall task that the model is tried on during training and by `hymba eval`."""
    recall_interval: int = 0
    """Steps between trials; 0: only at the end."""
    recall_seed: int = 1
    """Seed of the samples. Whatever it is, none of them is in a source of `hymba data recall`."""
    recall_symbols: int = 256
    """Ordinary tokens that keys and values are drawn from; the same number as `hymba data recall --num-symbols`."""
    recall_separators: list[int] = field(default_factory=list)
    """Four ids: between key and value, after a value, before a question, blank. []: rare ones are chosen."""


@dataclass
class RunConfig:
    name: str = TO_BE_GIVEN
    """Name of the run; its directory is run.directory/run.name, the same after every restart."""
    directory: str = "runs"
    """Directory that holds all runs."""
    objective: str = "pretrain"
    """pretrain (every token) | sft (the answers of conversations) | dpo (preference pairs): docs/instruct.md."""
    seed: int = 1234
    """Seed of initialisation and data order."""
    deterministic: bool = False
    """Use deterministic algorithms only."""
    cuda_graph: bool = False
    """Record the forward and backward passes of a step as a CUDA graph after a few steps, and replay it from then on:
    the host no longer limits the speed. One process, micro-batches of one shape; keeps the memory that
    activations need through evaluations and checkpoints."""
    train_steps: int | None = None
    """Stop after this step; schedules keep the length that the phases give. None: all phases."""
    device: str = "auto"
    """auto | cpu | cuda."""


@dataclass
class Config:
    """One run. Composed by :func:`hymba_train.config.compose`, checked by :mod:`hymba_train.plan`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    run: RunConfig = field(default_factory=RunConfig)


Plain = dict[str, Any]
"""A configuration as nested dicts, lists and scalars (what YAML holds)."""
