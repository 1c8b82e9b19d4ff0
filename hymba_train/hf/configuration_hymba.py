"""Configuration of Hymba models (``model_type: hymba``) for Hugging Face transformers.

Key names are those of the published nvidia/Hymba-1.5B-Base; the defaults are its values. Where a default depends on
others (``global_attn_idx``, ``kv_reuse_group`` with another ``num_hidden_layers``, say), give all of them.
"""

from transformers import PretrainedConfig

LAYER_TYPES = {"h": "attention and SSM side by side", "a": "attention only", "m": "SSM only"}
BRANCH_FUSIONS = ("mean", "concat")
DECODE_WINDOWS = ("training", "published")
DECODE_BACKENDS = ("auto", "eager", "graph", "compile")

_PUBLISHED_GROUPS = [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12], [13, 14], [16, 17, 18]]
_PUBLISHED_GROUPS += [[19, 20], [21, 22], [23, 24], [25, 26], [27, 28], [29, 30]]

# Keys that the published code reads or writes and that have only one meaning here.
_FIXED = {
    "attn_hidden_size": -1,
    "calc_logits_for_entire_prompt": False,
    "kq_head_dim": -1,
    "kq_norm": "none",
    "kv_reuse_every_i_layer": -1,
    "kv_weight_reuse": False,
    "mamba_conv_bias": True,
    "mamba_inner_layernorms": True,
    "mamba_proj_bias": False,
    "memory_tokens_interspersed_every": 0,
    "mlp_hidden_act": "silu",
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "num_mamba": 1,
    "output_router_logits": False,
    "rope": True,
    "router_aux_loss_coef": 0.001,
}
_MEANINGFUL = ("kq_norm", "mamba_conv_bias", "mamba_inner_layernorms", "mamba_proj_bias", "mlp_hidden_act", "rope")
_MEANINGFUL += ("memory_tokens_interspersed_every", "num_experts", "kv_reuse_every_i_layer")


class HymbaConfig(PretrainedConfig):
    r"""
    Args:
        vocab_size: tokens V.
        hidden_size: width D of the residual stream.
        num_hidden_layers: layers L.
        intermediate_size: width F of the gated MLP.
        num_attention_heads, num_key_value_heads: query heads H and KV heads G.
        attention_head_dim, attention_v_head_dim: widths of a head's keys and values. None: hidden_size / H, and
            mamba_expand times that. (The published code has no such keys, and overwrites its v_head_dim.)
        branch_fusion: what "h" layers make of their normed branches: "mean", or "concat", side by side into a wider
            out_proj, which the published code does not have.
        num_memory_tokens: learned meta tokens M in front of every sequence; they are not part of ``input_ids``.
        global_attn_idx: 0-based layers that see the whole past; None: all.
        sliding_window: distance W to the furthest key that the other layers see (W + 1 keys with their own), besides
            the meta tokens, which are always seen.
        kv_reuse_group: lists of layers; the first of each computes keys and values, the others use them.
        mamba_expand, mamba_d_state, mamba_d_conv, mamba_dt_rank: SSM branch: inner width / D, states a channel,
            convolution taps, rank of the time step ("auto": D / 16, rounded up).
        rope_theta, rope_type, max_position_embeddings, orig_max_position_embeddings: RoPE; rope_type "ntk" raises the
            base by (2 max / orig - 1) ** (dk / (dk - 2)), whatever the length of the sequence; "default" does not.
        layer_type: "h", "a" or "m" for each layer; None: all "h".
        layer_has_mlp: whether each layer has an MLP; None: all have.
        decode_window: "training": decoding sees the keys that training and prefill see, W + 1. "published": one key
            fewer, as nvidia/Hymba-1.5B-Base decodes.
        decode_backend: how one-token steps run on a CUDA device. "graph": captured as a CUDA graph; "compile": the
            layer compiled by torch.compile (slow to start, fastest after), captured; "eager"; "auto": "graph".
        attn_implementation_new: "flex": FlexAttention for prompts and training on CUDA, if torch has it; "eager": plain
            torch operations. One-token steps and CPUs always use plain operations.
        use_mamba_kernels: use mamba-ssm's kernels on CUDA where that package is installed.
    """

    model_type = "hymba"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size=32001,
        hidden_size=1600,
        num_hidden_layers=32,
        intermediate_size=5504,
        num_attention_heads=25,
        num_key_value_heads=5,
        num_memory_tokens=128,
        global_attn_idx=(0, 15, 31),
        sliding_window=1024,
        kv_reuse_group=_PUBLISHED_GROUPS,
        mamba_expand=2,
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_dt_rank="auto",
        hidden_act="silu",
        rope_theta=10000.0,
        rope_type="ntk",
        max_position_embeddings=8192,
        orig_max_position_embeddings=2048,
        seq_length=None,
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        attention_dropout=0.0,
        layer_type=None,
        layer_has_mlp=None,
        attention_head_dim=None,
        attention_v_head_dim=None,
        branch_fusion="mean",
        decode_window="training",
        decode_backend="auto",
        attn_implementation_new="flex",
        use_mamba_kernels=True,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.num_memory_tokens = num_memory_tokens
        layers = range(num_hidden_layers)
        self.global_attn_idx = list(layers if global_attn_idx is None or sliding_window is None else global_attn_idx)
        self.sliding_window = sliding_window
        self.kv_reuse_group = [list(group) for group in kv_reuse_group or ()]
        self.mamba_expand = mamba_expand
        self.mamba_d_state = mamba_d_state
        self.mamba_d_conv = mamba_d_conv
        self.mamba_dt_rank = -(-hidden_size // 16) if mamba_dt_rank in ("auto", None) else mamba_dt_rank
        self.hidden_act = hidden_act
        self.rope_theta = rope_theta
        self.rope_type = rope_type or "default"
        self.max_position_embeddings = max_position_embeddings
        self.orig_max_position_embeddings = orig_max_position_embeddings or max_position_embeddings
        self.seq_length = seq_length or max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.attention_dropout = attention_dropout
        self.layer_type = list(layer_type or "h" * num_hidden_layers)
        self.layer_has_mlp = list(layer_has_mlp or [True] * num_hidden_layers)
        self.attention_head_dim = attention_head_dim
        self.attention_v_head_dim = attention_v_head_dim
        self.branch_fusion = branch_fusion
        self.decode_window = decode_window
        self.decode_backend = decode_backend
        self.attn_implementation_new = attn_implementation_new
        self.use_mamba_kernels = use_mamba_kernels
        self.use_cache = use_cache
        # Derived; the published code overwrites v_head_dim in the same way and keys conv_dim by strings in JSON.
        self.v_head_dim = attention_v_head_dim or mamba_expand * hidden_size // num_attention_heads
        self.conv_dim = {str(i): mamba_expand * hidden_size for i in layers}
        kwargs.pop("v_head_dim", None)
        kwargs.pop("conv_dim", None)
        kwargs.pop("attn_implementation", None)  # "flex" in the published file; transformers knows no such value
        for key, value in _FIXED.items():
            setattr(self, key, kwargs.pop(key, value))
        self._check()
        super().__init__(
            bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings, **kwargs,
        )  # fmt: skip
        for key, value in (("bos", bos_token_id), ("eos", eos_token_id), ("pad", pad_token_id)):
            setattr(self, f"{key}_token_id", value)  # transformers 5 has no such fields of its own
        self.tie_word_embeddings = tie_word_embeddings

    @property
    def head_dim(self):
        """Width dk of a query or key head."""
        return self.attention_head_dim or self.hidden_size // self.num_attention_heads

    @property
    def inner_size(self):
        """Channels E of the SSM branch."""
        return self.mamba_expand * self.hidden_size

    @property
    def attention_size(self):
        """Width of all value heads together; E in Hymba."""
        return self.num_attention_heads * self.v_head_dim

    @property
    def rotary_base(self):
        """RoPE base after scaling."""
        if self.rope_type == "default":
            return self.rope_theta
        ratio = self.max_position_embeddings / self.orig_max_position_embeddings
        return self.rope_theta * (2 * ratio - 1) ** (self.head_dim / (self.head_dim - 2))

    def window(self, layer_idx):
        """Distance to the furthest visible text key of a layer in training and prefill; None: no limit."""
        return None if layer_idx in self.global_attn_idx else self.sliding_window

    def kv_source(self, layer_idx):
        """Layer whose keys and values a layer uses: itself, or the first of its group."""
        return next((group[0] for group in self.kv_reuse_group if layer_idx in group), layer_idx)

    def _check(self):
        problems = [
            f"{key}={getattr(self, key)!r} (only {_FIXED[key]!r})"
            for key in _MEANINGFUL
            if getattr(self, key) not in (_FIXED[key], None) and not (self.kv_reuse_group and "kv_reuse" in key)
        ]
        if self.hidden_act != "silu":
            problems.append(f"hidden_act={self.hidden_act!r} (only 'silu')")
        if self.attention_dropout:
            problems.append(f"attention_dropout={self.attention_dropout} (only 0.0)")
        if self.rope_type not in ("default", "ntk"):
            problems.append(f"rope_type={self.rope_type!r} (only 'ntk' or 'default')")
        for key, known in (("decode_window", DECODE_WINDOWS), ("decode_backend", DECODE_BACKENDS)):
            if getattr(self, key) not in known:
                problems.append(f"{key}={getattr(self, key)!r} (only {', '.join(known)})")
        undivided = self.attention_head_dim is None and self.hidden_size % self.num_attention_heads
        if undivided or self.num_attention_heads % self.num_key_value_heads:
            problems.append("hidden_size must divide by num_attention_heads, and that by num_key_value_heads")
        if self.branch_fusion not in BRANCH_FUSIONS:
            problems.append(f"branch_fusion={self.branch_fusion!r} (only {', '.join(BRANCH_FUSIONS)})")
        elif self.branch_fusion == "mean" and "h" in self.layer_type and self.attention_size != self.inner_size:
            problems.append("branch_fusion='mean' of branches that are not equally wide")
        for key in ("layer_type", "layer_has_mlp"):
            if len(getattr(self, key)) != self.num_hidden_layers:
                problems.append(f"{key} has {len(getattr(self, key))} entries for {self.num_hidden_layers} layers")
        if set(self.layer_type) - set(LAYER_TYPES):
            problems.append(f"layer_type has entries other than {', '.join(LAYER_TYPES)}")
        problems = problems or self._group_problems()
        if problems:
            raise ValueError("Hymba configuration that this code does not have: " + "; ".join(problems))

    def _group_problems(self):
        problems, layers = [], range(self.num_hidden_layers)
        if any(i not in layers for i in self.global_attn_idx):
            problems.append(f"global_attn_idx={self.global_attn_idx} names layers outside 0..{len(layers) - 1}")
        for group in self.kv_reuse_group:
            if any(i not in layers for i in group) or sorted(set(group)) != group:
                problems.append(f"kv_reuse_group: {group} must list layers within 0..{len(layers) - 1} in rising order")
            elif len({self.window(i) for i in group}) > 1 or "m" in (self.layer_type[i] for i in group):
                problems.append(f"kv_reuse_group: {group} mixes layers that see differently")
        if len(members := [i for group in self.kv_reuse_group for i in group]) != len(set(members)):
            problems.append("kv_reuse_group: a layer is in two groups")
        return problems
