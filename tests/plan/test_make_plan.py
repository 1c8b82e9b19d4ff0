"""The plan as a whole."""

import json

import pytest

from hymba_train.config import compose
from hymba_train.describe.activations import head_saved_tensors, layer_saved_tensors
from hymba_train.errors import UserError
from hymba_train.plan import make_plan
from hymba_train.plan.memory import setting_of
from hymba_train.plan.render import plan_to_json

FREE = ["experiment=pretrain_1p5b", "parallel=single", "parallel.world_size=null"]


def plan_of(*overrides, **keywords):
    return make_plan(compose(list(overrides)), check_paths=False, **keywords)


def test_the_published_model():
    plan = plan_of("experiment=pretrain_1p5b")
    assert plan.num_parameters == 1_522_797_824
    assert (plan.world_size, plan.data_parallel) == (128, 128)
    assert [layer.description.index for layer in plan.layers] == list(range(32))
    assert sum(layer.num_parameters for layer in plan.layers) + 51_201_600 + 204_800 + 1_600 == plan.num_parameters
    assert plan.chunks[0].layers == range(32) and plan.borders == () and plan.balance == 1.0
    assert plan.planning_seq_length == 2048
    assert plan.to_be_given == ("data.tokenizer", "data.sources.dclm.path", "data.sources.smollm.path")


def test_phases_of_the_published_recipe():
    plan = plan_of("experiment=pretrain_1p5b")
    stable, anneal, long = plan.phases
    assert [p.num_steps for p in plan.phases] == [476_837, 190_734, 47_683]
    assert plan.steps.num_steps == 715_254
    assert {p.tokens_per_step for p in plan.phases} == {2_097_152}
    assert [round(p.rotary_base, 2) for p in plan.phases] == [10_000, 10_000, 74_534.83]
    assert [round(p.training_flops_per_token / 1e9, 3) for p in plan.phases] == [10.565, 10.565, 10.573]
    assert (stable.num_micro_batches, long.seq_length, anneal.name) == (1, 8192, "anneal")
    assert stable.num_tokens + stable.tokens_left_over == 10**12


@pytest.mark.parametrize("pipeline", [2, 4, 8, 16])
def test_every_layer_is_in_one_stage(pipeline):
    plan = plan_of(*FREE, f"parallel.pipeline={pipeline}")
    held = [i for chunk in plan.chunks for i in chunk.layers]
    assert held == list(range(32)) and [chunk.pipeline_rank for chunk in plan.chunks] == list(range(pipeline))
    assert [b.kv_producers for b in plan.borders] == [()] * (pipeline - 1)
    assert {layer.description.index: layer.pipeline_rank for layer in plan.layers} == {
        i: c.pipeline_rank for c in plan.chunks for i in c.layers
    }


def test_interleaved_stages():
    plan = plan_of(*FREE, "parallel.pipeline=4", "parallel.virtual_pipeline=2")
    assert plan.chunks[0].layers == range(0, 3)
    assert [i for chunk in plan.chunks for i in chunk.layers] == list(range(32))
    places = [(chunk.virtual_rank, chunk.pipeline_rank) for chunk in plan.chunks]
    assert places == [(v, rank) for v in range(2) for rank in range(4)]


def test_a_layout_of_ones_own():
    plan = plan_of(*FREE, "parallel.pipeline=4", "parallel.pipeline_layout=[8,8,8,8]")
    assert [c.layers for c in plan.chunks] == [range(0, 8), range(8, 16), range(16, 24), range(24, 32)]
    assert [(b.layer, b.kv_producers, b.kv_width) for b in plan.borders] == [
        (8, (7,), 960),
        (16, (), 0),
        (24, (23,), 960),
    ]
    assert 1 < plan.balance < 1.1


def test_world_size_comes_from_the_caller_the_recipe_or_the_layout():
    assert plan_of("model=hymba_tiny", "parallel=tp2_pp2").world_size == 4
    assert plan_of("model=hymba_tiny", "parallel=tp2_pp2", "parallel.world_size=null").world_size == 4
    plan = plan_of("model=hymba_tiny", "parallel=dp", world_size=6)
    assert (plan.world_size, plan.data_parallel) == (6, 6)


def test_micro_batches_and_bubble_follow_the_layout():
    plan = plan_of(*FREE, "parallel.pipeline=4", world_size=16)
    assert plan.data_parallel == 4
    assert plan.phases[0].num_micro_batches == 1024 // (8 * 4) == 32
    assert plan.phases[0].bubble_fraction == pytest.approx(3 / 35)


def test_model_memory_against_the_roofline():
    """bench/roofline: 25.5 GiB of weights, gradients and optimizer at DP = 1, 10.6 at DP = 8."""
    one = plan_of("experiment=pretrain_1p5b", "parallel=single").memory[0]
    eight = plan_of("experiment=pretrain_1p5b", "parallel=dp8").memory[0]
    assert one.model_bytes / 2**30 == pytest.approx(25.5, abs=0.1)
    assert eight.model_bytes / 2**30 == pytest.approx(10.6, abs=0.1)
    assert one.held_parameters == 1_522_797_824 + (32_128 - 32_001) * 1600
    parts = one.weight_bytes, one.gradient_bytes, one.optimizer_bytes
    assert [round(part / one.held_parameters, 1) for part in parts] == [2, 4, 12]
    assert eight.optimizer_bytes == one.optimizer_bytes // 8 and eight.weight_bytes == one.weight_bytes
    float32 = plan_of("experiment=pretrain_1p5b", "parallel=single", "precision=float32").memory[0]
    assert float32.model_bytes == 16 * one.held_parameters


@pytest.mark.parametrize(("precision", "micro_batch", "measured"), [("bf16", 12, 115.6), ("fp8", 12, 109.6)])
def test_memory_is_what_an_h200_needed(precision, micro_batch, measured):
    """Peaks in GiB of benchmarks/README.md (issue 7: within 5 %); temporaries are left out."""
    phase = "data.phases.bench."
    sizes = [f"{phase}{key}={micro_batch}" for key in ("micro_batch_size", "global_batch_size")]
    tokens = f"{phase}tokens={micro_batch * 2048 * 20}"
    plan = plan_of("experiment=bench_1p5b", "parallel=single", f"precision={precision}", *sizes, tokens)
    assert plan.memory[0].total_bytes / 2**30 == pytest.approx(measured, rel=0.01)


def test_activations_are_the_listed_tensors():
    """One stage of one process holds every layer's tensors once; tests/describe holds the lists to autograd."""
    plan = plan_of("experiment=bench_1p5b", "parallel=single")
    (stage,), (phase,) = plan.memory, plan.config.data.phases.values()
    setting = setting_of(plan.config, phase)
    rows = 128 + phase.micro_batch_size * phase.seq_length
    model, layers = plan.config.model, [layer.description for layer in plan.layers]
    head = [t for t in head_saved_tensors(model, setting) if t.name != "logits"]
    saved = sum(t.bytes_per_row for layer in layers for t in layer_saved_tensors(model, layer, setting))
    expected = rows * (saved + sum(t.bytes_per_row for t in head))
    assert stage.activation_bytes == stage.activation_bytes_by_recompute["none"] == pytest.approx(expected, rel=1e-9)
    assert stage.logit_bytes == phase.micro_batch_size * phase.seq_length * 32_128 * 2  # in place, in bf16
    assert stage.activation_bytes_by_recompute["full"] < stage.activation_bytes / 5
    recomputed = plan_of("experiment=bench_1p5b", "parallel=single", "parallel.recompute=full").memory[0]
    assert recomputed.activation_bytes == stage.activation_bytes_by_recompute["full"]
    assert recomputed.total_bytes < stage.total_bytes


def test_backends_decide_what_is_saved():
    auto, torch, cpu = (
        plan_of("experiment=bench_1p5b", "parallel=single", *overrides).memory[0].activation_bytes
        for overrides in ([], ["precision.attention_backend=torch"], ["run.device=cpu", "precision.layer_spec=local"])
    )
    assert auto < torch < cpu


def test_messages_between_stages_are_buffers():
    first, second = plan_of(*FREE, "parallel.pipeline=2", "parallel.pipeline_layout=[8,24]").memory
    alone = plan_of(*FREE).memory[0]
    rows = 128 + 8 * 2048
    message = 2 * rows * (1600 + 960) * 2  # two micro-batches in flight; bf16; one producer's K and V travel along
    assert first.buffer_bytes - 2 * alone.buffer_bytes == message and second.buffer_bytes < first.buffer_bytes


def test_tied_embedding_is_held_by_both_end_stages():
    ends = plan_of(*FREE, "parallel.pipeline=4").memory
    whole = plan_of(*FREE).memory[0]
    assert sum(stage.held_parameters for stage in ends) == whole.held_parameters + 32_128 * 1600
    assert ends[0].activation_bytes > ends[2].activation_bytes  # 1F1B: the first stage waits longest


def test_notes_say_what_is_padded_left_over_or_unused():
    notes = "\n".join(plan_of("experiment=pretrain_1p5b", "parallel=tp4_sp", "model.num_meta_tokens=126").notes)
    assert "pads 25 heads to 28: 12% more work" in notes
    assert "5 KV heads do not divide over 4 ranks" in notes
    assert "phase stable: 2 zero rows a micro-batch" in notes
    notes = plan_of("experiment=demo", "~data.phases.long", "data.phases.stable.tokens=5000", "run.train_steps=1").notes
    assert notes[0] == "phase stable: 904 tokens at its end do not fill a batch and are left out"
    assert notes[1] == "run.train_steps=1 of 2: stops early; schedules keep their length"
    notes = plan_of("experiment=demo", "data.sources.more.path=x").notes
    assert notes == ("data.sources.more is in no phase's blend: not used at all",)


def test_a_model_without_data_can_be_planned_but_not_trained():
    plan = plan_of("model=hymba_125m")
    assert plan.steps is None and plan.phases == ()
    assert plan.to_be_given == ("data.tokenizer", "run.name", "data.phases", "data.sources")
    with pytest.raises(UserError, match=r"data\.tokenizer: to be given \(Directory with tokenizer") as caught:
        plan.require_complete()
    assert len(caught.value.problems) == 4


def test_a_phase_with_open_numbers_is_left_out_of_the_steps():
    plan = plan_of("experiment=demo", "data.phases.long.tokens=???")
    assert [p.name for p in plan.phases] == ["stable"] and plan.steps is None
    assert plan.to_be_given == ("data.phases.long.tokens",)


def test_files_that_are_named_must_be_there(demo_data):
    config = compose(["experiment=demo", f"data.path={demo_data}"])
    make_plan(config).require_complete()
    (demo_data / "books.idx").unlink()
    (demo_data / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError) as caught:
        make_plan(config)
    tokenizer, books = caught.value.problems
    assert tokenizer.startswith("data.tokenizer=tokenizer: ") and "tokenizer.json" in tokenizer
    assert books.startswith("data.sources.books.path=books: ") and f"{demo_data}/books.idx" in books
    assert "books.bin" not in books
    make_plan(config, check_paths=False)


def test_packings_must_be_made_beforehand(demo_data):
    packed = ["experiment=demo", f"data.path={demo_data}", "~data.phases.long", "data.phases.stable.packing=best_fit"]
    with pytest.raises(UserError) as caught:
        make_plan(compose(packed))
    assert len(caught.value.problems) == 4
    assert f"no {demo_data}/books.best_fit-256.pack; make it once, offline: `hymba data pack`" in str(caught.value)


def test_a_run_whose_data_path_is_open_looks_for_its_start_alone():
    with pytest.raises(UserError, match=r"checkpoint\.load=/no/such/run: no such directory"):
        make_plan(compose(["experiment=demo", "data.path=???", "checkpoint.load=/no/such/run"]))


def test_fp8_leaves_impossible_stacks_to_the_models_own_check():
    with pytest.raises(UserError) as caught:
        plan_of("experiment=pretrain_1p5b", "precision=fp8", "model.layer_pattern=[hybird]")
    (problem,) = caught.value.problems
    assert problem.startswith("model.layer_pattern: 'hybird'")


def test_ramp_up_is_checked_at_every_size():
    ramp = "data.phases.stable.rampup_batch_size=[256,256,1e10]"
    plan = plan_of("experiment=pretrain_1p5b", "parallel=dp8", ramp)
    assert [s.global_batch_size for s in plan.steps.segments] == [256, 512, 768, 1024, 1024, 256]
    with pytest.raises(UserError) as caught:
        plan_of("experiment=pretrain_1p5b", ramp)
    first = caught.value.problems[0]
    assert first.startswith("data.phases.stable.rampup_batch_size: batch size 256 is not a multiple of ")
    assert first.endswith("micro_batch_size 8 x 128 data-parallel ranks = 1024: nearest is 1024")


def test_json_holds_the_whole_plan():
    data = json.loads(json.dumps(plan_to_json(plan_of("experiment=pretrain_1p5b", "parallel=pp4"))))
    assert data["num_parameters"] == 1_522_797_824 and data["num_steps"] == 715_254
    assert len(data["layers"]) == 32 and data["layers"][16]["description"]["kv_consumers"] == [17, 18]
    assert data["chunks"][1]["layers"] == list(range(7, 16))
    assert data["phases"][2]["rotary_base"] == pytest.approx(74_534.83, abs=0.01)
