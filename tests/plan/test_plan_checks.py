"""Checks that need more than one override to show."""

import pytest

from hymba_train.config import compose
from hymba_train.config.nearest import divisors_around, multiples_around
from hymba_train.errors import UserError
from hymba_train.plan import make_plan

FP8 = ["experiment=pretrain_1p5b", "precision=fp8", "parallel=single", "parallel.world_size=null"]


def problems(*overrides, world_size=None):
    with pytest.raises(UserError) as caught:
        make_plan(compose(list(overrides)), world_size, check_paths=False)
    return list(caught.value.problems)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
@pytest.mark.parametrize("tensor", [1, 2, 4, 5])
def test_fp8_fits_the_published_model(tensor, recipe):
    ffn = [] if 5504 % (16 * tensor) == 0 else [f"model.ffn_hidden_size={5520 if tensor == 5 else 5504}"]
    make_plan(compose([*FP8, f"precision.fp8={recipe}", f"parallel.tensor={tensor}", *ffn]), check_paths=False)


def test_mxfp8_fits_the_published_model():
    make_plan(compose([*FP8, "precision.fp8=mxfp8"]), check_paths=False)


def test_blockwise_fp8_does_not_fit_the_published_model():
    assert problems(*FP8, "precision.fp8=blockwise") == [
        "precision.fp8=blockwise: model.hidden_size=1600 is not a multiple of 128: nearest are 1536 and 1664; "
        "change model.hidden_size, or set precision.fp8=delayed",
        "precision.fp8=blockwise: mixer.in_proj is 8000 wide, not a multiple of 128: nearest are 7936 and 8064; "
        "change model.num_attention_heads, or set precision.fp8=delayed",
    ]
    fits = ["model.hidden_size=1536", "model.num_attention_heads=24", "model.num_query_groups=6"]
    make_plan(compose([*FP8, "precision.fp8=blockwise", *fits]), check_paths=False)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["precision.layer_spec=local"],
            "precision.fp8=delayed needs Transformer Engine, but precision.layer_spec=local",
        ),
        (["precision.params=float32"], "precision.fp8=delayed needs precision.params=bf16, not float32; set that"),
        (
            ["model.ffn_hidden_size=5500"],
            "ffn.linear_fc2 is 5500 wide, not a multiple of 16: nearest are 5488 and 5504; change "
            "model.ffn_hidden_size, or set precision.fp8=null",
        ),
        (["model.hidden_size=1650"], "model.hidden_size=1650 is not a multiple of 16: nearest are 1648 and 1664"),
        (
            ["parallel.tensor=2", "model.ffn_hidden_size=5520"],
            "ffn.linear_fc2 is 2760 wide on each of 2 tensor-parallel ranks, not a multiple of 16",
        ),
        (["model.num_meta_tokens=100"], "= 16484 rows, not a multiple of 16: nearest are 16480 and 16496"),
        (["precision.fp8=mxfp8", "model.num_meta_tokens=112"], "= 16496 rows, not a multiple of 32"),
    ],
)
def test_fp8_shapes(overrides, line):
    assert any(line in problem for problem in problems(*FP8, *overrides))


def test_fp8_leaves_x_proj_and_dt_proj_in_bf16():
    """R + 2N = 132 and R = 100 are no multiples of 16, and need not be."""
    make_plan(compose([*FP8, "model.mamba_dt_rank=100"]), check_paths=False)


def test_fp8_recipes_are_named_as_in_megatron_core():
    line = "precision.fp8=current: not one of delayed, tensorwise, blockwise, mxfp8"
    assert problems(*FP8, "precision.fp8=current") == [line]


def test_fp8_and_transformer_engine_need_a_gpu():
    lines = problems(*FP8, "run.device=cpu")
    assert [line.split(";")[0] for line in lines] == [
        "precision.layer_spec=transformer_engine needs a GPU, run.device is cpu",
        "precision.fp8=delayed needs Transformer Engine, but run.device=cpu",
    ]


def test_fp8_rows_are_those_of_a_rank_under_sequence_parallelism():
    overrides = [*FP8, "parallel.tensor=2", "parallel.sequence=true", "model.num_meta_tokens=144"]
    assert "not a multiple of 32" in problems(*overrides)[0]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["run.device=cpu", "precision.attention_backend=flex"], "precision.attention_backend=flex needs a GPU"),
        (["run.device=cpu", "precision.scan_backend=triton"], "precision.scan_backend=triton needs a GPU"),
        (["precision.attention_backend=flex", "run.deterministic=true"], "attention_backend=flex is not deterministic"),
        (["precision.scan_backend=triton", "model.mamba_state_dim=12"], "nearest are 8 and 16"),
        (
            ["run.device=cuda", "model.mamba_state_dim=24"],
            "wants a power of two: nearest are 16 and 32",
        ),
        (["precision.scan_backend=cuda", "model.mamba_state_dim=32"], "the CUDA scan takes 16 at most"),
        (["precision.attention_backend=cudnn", "precision.params=float32"], "attention_backend=cudnn has no float32"),
        (
            ["precision.attention_backend=cudnn", "precision=bf16", "model.num_attention_heads=16"],
            "heads of 8 with values of 16: cuDNN takes 16, 32, 64, 128 with meta tokens; choose 4 or 8 heads, or set "
            "precision.attention_backend=torch",
        ),
        (
            ["run.device=cuda", "precision=bf16", "model.mamba_expand=3", "precision.rope_backend=torch"],
            "heads of 32 with values of 96: cuDNN takes 16, 32, 64, 128 with meta tokens; no number of heads fits, or "
            "set precision.attention_backend=flex",
        ),
        (
            [
                "precision.attention_backend=cudnn",
                "precision=bf16",
                "model.num_meta_tokens=0",
                "model.num_attention_heads=32",
            ],
            "heads of 4 with values of 8: cuDNN takes multiples of 8 up to 128; choose 8 or 16 heads, or set "
            "precision.attention_backend=torch",
        ),
        (["run.device=cpu", "precision.scan_backend=cuda"], "precision.scan_backend=cuda needs a GPU"),
        (["run.device=cuda", "model.num_attention_heads=16", "model.num_query_groups=4"], "choose 8 at most"),
    ],
)
def test_what_kernels_cannot_do(overrides, line):
    (problem,) = problems("experiment=demo", *overrides)
    assert line in problem


def test_cudnn_takes_more_widths_without_meta_tokens():
    odd = ["precision.attention_backend=cudnn", "precision=bf16", "model.num_attention_heads=16"]
    make_plan(compose(["experiment=demo", *odd, "model.num_meta_tokens=0"]), check_paths=False)


def test_widths_are_looked_at_again_where_auto_turns_out_to_be_a_gpu(monkeypatch):
    import torch

    from hymba_train.model.ops import select_ops
    from hymba_train.ops import registry

    monkeypatch.setattr(registry, "is_importable", lambda package: True)
    config = compose(["experiment=demo", "precision=bf16", "model.num_attention_heads=16", "run.device=auto"])
    make_plan(config, check_paths=False)
    with pytest.raises(UserError, match="choose 4 or 8 heads"):
        select_ops(config, torch.device("cuda"), torch.bfloat16)


def test_delayed_scaling_is_not_recomputed():
    (line,) = problems(*FP8, "parallel.recompute=full")
    assert "forget its history of amaxes" in line and "set precision.fp8=tensorwise" in line
    make_plan(compose([*FP8, "parallel.recompute=full", "precision.fp8=tensorwise"]), check_paths=False)


def test_what_kernels_need_is_not_asked_of_others():
    """On a CPU the plain backends run, and `auto` may mean a CPU."""
    for device in ("cpu", "auto"):
        odd = ["model.mamba_state_dim=24", "model.num_attention_heads=16", "model.num_query_groups=4"]
        make_plan(compose(["experiment=demo", f"run.device={device}", *odd]), check_paths=False)


def test_parallel_needs_a_head_a_rank_and_known_micro_batches():
    tiny = ["experiment=demo", "parallel.world_size=null"]
    (line,) = problems(*tiny, "parallel.pipeline=2", "parallel.pipeline_layout=[0,8]")
    assert line.startswith("parallel.pipeline_layout=[0, 8]: every chunk needs a layer")
    (line,) = problems(*tiny, "model.rope_type=ntk", "model.hidden_size=8")
    assert line == "model.num_attention_heads=4: heads of 2 are too narrow for rope_type=ntk; choose 2 at most"


def test_unknown_decays_and_impossible_shares_are_all_named():
    lines = problems(
        "experiment=demo", "schedule.lr_decay_style=wds", "schedule.lr_wsd_decay_style=sqrt",
        "schedule.lr_warmup_fraction=1.5", "schedule.lr_wsd_decay_fraction=-0.1",
    )  # fmt: skip
    assert [line.partition(":")[0] for line in lines] == [
        "schedule.lr_decay_style=wds", "schedule.lr_warmup_fraction=1.5", "schedule.lr_wsd_decay_fraction=-0.1",
        "schedule.lr_wsd_decay_style=sqrt",
    ]  # fmt: skip
    (line,) = problems("experiment=demo", "schedule.lr_warmup_fraction=0.5", "schedule.lr_wsd_decay_fraction=0.6")
    assert line.endswith("add up to more than 1: lower one by 0.1")


def test_exponential_decay_never_reaches_nothing():
    lines = problems("experiment=demo", "schedule.lr_wsd_decay_style=exponential", "optim.min_lr=0")
    assert lines == [
        "optim.min_lr=0 is never reached by schedule.lr_wsd_decay_style=exponential; set optim.min_lr above 0"
    ]


def test_world_size_must_hold_whole_replicas():
    assert problems("model=hymba_tiny", "parallel=tp2_pp2", "parallel.world_size=null", world_size=6) == [
        "6 processes run, no multiple of parallel.tensor 2 x parallel.pipeline 2 = 4: nearest are 4 and 8"
    ]


def test_interleaved_micro_batches_come_in_groups_of_the_pipeline():
    overrides = ["experiment=demo", "parallel=pp4", "parallel.virtual_pipeline=2"]
    lines = problems(*overrides, "data.phases.stable.global_batch_size=12")
    assert lines == [
        "data.phases.stable.global_batch_size=12 is not a multiple of data.phases.stable.micro_batch_size 2 x 1 "
        "data-parallel ranks x 4 pipeline stages (interleaved schedule) = 8: nearest are 8 and 16"
    ]
    make_plan(compose(overrides), check_paths=False)
    make_plan(
        compose(["experiment=demo", "parallel=pp4", "data.phases.stable.global_batch_size=12"]), check_paths=False
    )


def test_exports_need_checkpoints():
    exports = ["model=hymba_tiny", "checkpoint.export_interval=100"]
    assert problems(*exports, "checkpoint=none")[0].startswith("checkpoint.export_interval=100 needs checkpoints")
    make_plan(compose([*exports, "checkpoint=default"]), check_paths=False)


def test_what_has_no_export_is_not_exported():
    exports = ["model=mamba2_20m", "checkpoint.export_interval=100"]
    (line,) = problems(*exports)
    assert line.startswith("model.layer_pattern=['mamba2:no_ffn']: the Hugging Face format of Hymba has no mamba2")
    assert line.endswith("set checkpoint.export_interval=null (it is 100)")


BRANCHES = [
    (["model.v_head_dim=32"], "branch_fusion=mean needs equal widths: set model.v_head_dim=null or"),
    (["model.kv_channels=15"], "model.kv_channels=15 is odd"),
    (["model.num_attention_heads=3", "model.kv_channels=32", "model.num_query_groups=1"], "does not divide"),
    (["model.layer_pattern=[mamba2]", "model.kv_groups=[]", "model.mamba2_head_dim=48"], "mamba2_head_dim=48 does not"),
    (
        ["model.layer_pattern=[mamba2]", "model.kv_groups=[]", "model.mamba2_num_groups=3"],
        "mamba2_num_groups=3 does not divide the 4 heads",
    ),
    (
        ["model.layer_pattern=[mamba2]", "model.kv_groups=[]", "model.mamba2_head_dim=256", "parallel=tp2"],
        "parallel.tensor=2 does not divide the 1 heads of a mamba2 layer",
    ),
    (
        ["model.layer_pattern=[mamba2]", "model.kv_groups=[]", "model.mamba2_head_dim=128", "precision.ssd_backend=x"],
        "precision.ssd_backend=x: no such backend",
    ),
    (
        ["model.layer_pattern=[mamba2]", "model.kv_groups=[]", "model.mamba2_state_dim=24", "run.device=cuda"],
        "model.mamba2_state_dim=24: the kernels of mamba_ssm want a power of two",
    ),
]


@pytest.mark.parametrize(("overrides", "text"), BRANCHES, ids=[text for _, text in BRANCHES])
def test_widths_of_branches(overrides, text):
    assert any(text in line for line in problems("model=hymba_tiny", *overrides))


def test_groups_of_mamba2_and_tensor_parallelism():
    base = ["model=hymba_tiny", "model.layer_pattern=[mamba2]", "model.kv_groups=[]", "model.mamba2_head_dim=8"]
    base += ["model.num_attention_heads=8", "parallel=tp4_sp"]
    assert problems(*base, "model.hidden_size=192", "model.mamba2_num_groups=6") == [
        "parallel.tensor=4 and model.mamba2_num_groups=6: one must be a multiple of the other; nearest are 3 and 6"
    ]
    for groups in (1, 2, 8):
        make_plan(compose([*base, f"model.mamba2_num_groups={groups}"]), check_paths=False)


def test_problems_of_every_part_are_reported_together():
    lines = problems(
        "experiment=demo", "model.num_query_groups=3", "parallel.context=2", "precision.params=fp16", "optim.min_lr=1",
        "data.phases.long.blend.x=1.0", "data.phases.stable.seq_length=4096", "parallel.pipeline_layout=[9]",
    )  # fmt: skip
    keys = ["precision.params", "model.num_query_groups", "parallel.context", "parallel.pipeline_layout"]
    keys += ["optim.min_lr", "data.phases.stable.seq_length", "data.phases.long.blend.x"]
    assert [line.replace("=", ":").split(":")[0] for line in lines] == keys


def test_open_values_that_plan_cannot_do_without():
    assert problems("experiment=demo", "optim.lr=???", "parallel.tensor=???", "data.phases.long.rope_type=???") == [
        "parallel.tensor: to be given; nothing can be planned without it",
        "optim.lr: to be given; nothing can be planned without it",
        "data.phases.long.rope_type: to be given; nothing can be planned without it",
    ]


def test_nearest_numbers():
    assert multiples_around(7, 24) == "nearest is 24"
    assert multiples_around(25, 24) == "nearest are 24 and 48"
    assert divisors_around(25, 1600) == "nearest are 20 and 32"
    assert divisors_around(9, 8) == "nearest is 8"


GRAPH = ["experiment=bench_1p5b", "parallel=single", "run.cuda_graph=true"]
PLAIN = ["precision.attention_backend=torch"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["parallel=tp2"], "run.cuda_graph=true with parallel.tensor=2: tensor parallelism is not supported yet; set"),
        (["parallel=pp2"], "run.cuda_graph=true with parallel.pipeline=2: stages exchange messages; set"),
        (["parallel.recompute=full"], "run.cuda_graph=true with parallel.recompute=full: the host puts random states"),
        (["precision=fp8", "precision.fp8=tensorwise"], "run.cuda_graph=true with precision.fp8=tensorwise is not"),
        (["data.document_mask=true"], "set data.document_mask=false, or run.cuda_graph=false"),
        (["run.objective=sft", "data.document_mask=true"], "run.cuda_graph=true with run.objective=sft: documents are"),
        (
            ["parallel=dp", "parallel.world_size=2", "data.phases.bench.global_batch_size=16"],
            "run.cuda_graph=true with 2 data-parallel ranks: it was never run on several GPUs; start one process",
        ),
        (["precision.attention_backend=flex"], "precision.attention_backend=flex was never recorded; set"),
        (["model.branch_fusion=concat"], "model.branch_fusion=concat: its norm makes tensors"),
        (["model.layer_pattern=[mamba2]", "model.kv_groups=[]"], "model.layer_pattern with mamba2, which was never"),
        (["run.deterministic=true"], "precision.attention_backend=auto: replaying cuDNN's attention crashed in a"),
        (["data.phases.bench.seq_length=2000"], "bench.seq_length=2000: where this is no multiple of 128, cuDNN's"),
        (["model.num_meta_tokens=64"], "model.num_meta_tokens=64: where this is no multiple of 128, cuDNN's frontend"),
        (["run.device=cpu"], "run.cuda_graph=true needs a GPU, run.device is cpu; set run.cuda_graph=false"),
    ],
)
def test_a_graph_wants_the_same_kernels_every_step(overrides, line):
    (found,) = [p for p in problems(*GRAPH, *overrides) if "run.cuda_graph" in p]
    assert line in found


@pytest.mark.parametrize(
    "overrides",
    [[], ["precision=fp8"], ["run.deterministic=true", *PLAIN], ["model.num_meta_tokens=64", *PLAIN]],
)
def test_a_graph_is_planned(overrides):
    assert make_plan(compose([*GRAPH, *overrides]), check_paths=False).config.run.cuda_graph
