"""The places that :mod:`tests.breaks` breaks, in the order the data go."""

from __future__ import annotations

from dataclasses import dataclass

PARITY = "tests/distributed/test_parity.py::test_equals_single_process"


@dataclass(frozen=True)
class Break:
    """``old``, which is in ``path`` once, becomes ``new``; one of ``tests`` (pytest's arguments) should then fail."""

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]


BREAKS = [
    Break(
        "an unknown configuration key accepted", "hymba_train/config/typed.py",
        "            problems.append(_unknown(dotted, nearby, root))\n",
        "",
        ("tests/config/test_compose.py",),
    ),
    Break(
        "loss on the user's turns of a conversation", "data_prep/chat.py",
        "if answer is not None and answer >= conversation.num_given",
        "if answer is None or answer >= conversation.num_given",
        ("tests/instruct/test_chat_data.py",),
    ),
    Break(
        "recall tasks trained on with the evaluation's seeds", "hymba_train/evaluation/recall.py",
        "TRAINING, EVALUATION = 1, 2",
        "TRAINING, EVALUATION = 1, 1",
        ("tests/evaluation/test_recall.py",),
    ),
    Break(
        "samples in an order that depends on the data-parallel size", "hymba_train/data/batches.py",
        "        begin = first_sample + turn * per_turn + data_parallel_rank * micro_batch_size\n",
        "        share = global_batch_size // data_parallel_size\n"
        "        begin = first_sample + turn * micro_batch_size + data_parallel_rank * share\n",
        ("tests/data/test_training_data.py",),
    ),
    Break(
        "a window one key too narrow", "hymba_train/ops/attention.py",
        "visible &= query - key <= window",
        "visible &= query - key < window",
        ("tests/ops/test_op_attention.py",),
    ),
    Break(
        "meta tokens masked by the window", "hymba_train/ops/attention.py",
        "        meta_visible = visible.new_ones(*visible.shape[:-1], meta_k.shape[0])\n",
        "        meta_visible = visible.new_full((*visible.shape[:-1], meta_k.shape[0]), low == 0)\n",
        ("tests/ops/test_op_attention.py",),
    ),
    Break(
        "RoPE positions not restarted at a document", "hymba_train/model/rows.py",
        "        if positions is None:\n",
        "        if True:\n",
        ("tests/model/test_golden.py",),
    ),
    Break(
        "SSM state not reset at a document", "hymba_train/model/ssm.py",
        "num_meta=rows.num_meta, batch=rows.batch, seq=rows.seq, segment_ids=batch.segment_ids,",
        "num_meta=rows.num_meta, batch=rows.batch, seq=rows.seq, segment_ids=None,",
        ("tests/data/test_leaks.py",),
    ),
    Break(
        "convolution not reset at a document", "hymba_train/model/ssm.py",
        "            segment_ids=batch.segment_ids, reach=batch.reach,\n",
        "            segment_ids=None, reach=None,\n",
        ("tests/data/test_leaks.py",),
    ),
    Break(
        "no gradient to shared K/V from their consumers", "hymba_train/model/stack.py",
        "kv = shared[description.kv_source] if",
        "kv = tuple(t.detach() for t in shared[description.kv_source]) if",
        ("tests/model/test_golden.py",),
    ),
    Break(
        "branch norms over the padded width", "hymba_train/model/mixer.py",
        "weights, eps, d.inner_size, all_reduce)",
        "weights, eps, ssm.shape[-1] * self.tp_group.size(), all_reduce)",
        (f"{PARITY}[heads25-tp2]",),
    ),
    Break(
        "gradients of norms not summed under sequence parallelism", "hymba_train/model/norm.py",
        "self.weight.sequence_parallel = sequence_parallel",
        "self.weight.sequence_parallel = False",
        (f"{PARITY}[demo-tp2_sp]",),
    ),
    Break(
        "gradients of tied embeddings not summed over the pipeline", "hymba_train/model/model.py",
        "weight.shared_embedding = True",
        "weight.shared_embedding = False",
        (f"{PARITY}[demo-pp2]",),
    ),
    Break(
        "the loss averaged per micro-batch", "hymba_train/train/step.py",
        "    return loss_sum, num_tokens, {",
        "    return loss_sum / num_tokens.clamp(min=1), num_tokens, {",
        (f"{PARITY}[demo-dp2]",),
    ),
    Break(
        "DPO's sign", "hymba_train/train/dpo.py",
        "margin = chosen - rejected",
        "margin = rejected - chosen",
        ("tests/instruct/test_objectives.py",),
    ),
    Break(
        "weight decay on norms", "hymba_train/describe/tensors.py",
        "return TensorDescription(name, (size,), hf, float32=True)",
        "return TensorDescription(name, (size,), hf, weight_decay=True, float32=True)",
        ("tests/train/test_optimizer.py",),
    ),
    Break(
        "a skipped step counted by the optimizer", "hymba_train/train/step.py",
        "                adam.uncount()\n",
        "                pass\n",
        ("tests/reliability/test_numerics.py",),
    ),
    Break(
        "a rewind that keeps the bad batch", "hymba_train/guards/ledger.py",
        "        self.left_out.append(entry)\n",
        "",
        ("tests/reliability/test_numerics.py",),
    ),
    Break(
        "FP8's memory not restored after an evaluation", "hymba_train/train/step.py",
        "gathered_parameters(self.chunks), self._fp8.untouched():",
        "gathered_parameters(self.chunks):",
        ("tests/reliability/test_fp8_memory.py",),
    ),
    Break(
        "a checkpoint published before it is on the disk", "hymba_train/checkpoint/directory.py",
        '    for path in incomplete.rglob("*"):\n        fsync(path)\n    fsync(incomplete)\n',
        "",
        ("tests/checkpoint/test_directory.py",),
    ),
    Break(
        "a checkpoint published without being read back", "hymba_train/checkpoint/writing.py",
        "            found = manifest.hash_file(path / name)\n        if",
        "            found = expected\n        if",
        ("tests/checkpoint/test_writing.py",),
    ),
    Break(
        "checksums of the manifest not compared", "hymba_train/checkpoint/manifest.py",
        "elif (found := hash_file(path)) != expected:",
        "elif (found := hash_file(path)).num_bytes != expected.num_bytes:",
        ("tests/reliability/test_integrity.py",),
    ),
    Break(
        "retention that deletes the last verified checkpoint", "hymba_train/checkpoint/directory.py",
        "        gone = [p for p in gone if p != good]\n",
        "",
        ("tests/reliability/test_retention.py",),
    ),
    Break(
        "a lock that two can hold", "hymba_train/checkpoint/run_lock.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        ("tests/reliability/test_run_lock.py",),
    ),
    Break(
        "an export with two slices of in_proj swapped", "hymba_train/convert/source.py",
        "        tensors = [self.reader.read(key) for key in keys]\n",
        '        keys = [*keys[:-2], keys[-1], keys[-2]] if name.endswith("in_proj.weight") else keys\n'
        "        tensors = [self.reader.read(key) for key in keys]\n",
        ("tests/convert/test_convert_golden.py",),
    ),
    Break(
        "padding among the exported convolution's inputs", "hymba_train/hf/modeling_hymba.py",
        "ends = rows.counts if rows.counts is not None else torch.full",
        "ends = torch.full",
        ("tests/hf/test_hf_padding_and_cache.py",),
    ),
]  # fmt: skip
