"""Padding, caches and generation: every way to compute a token gives the same."""

import copy

import pytest
import torch

from hymba_train.hf.modeling_hymba import HymbaCache
from tests.hf_models import make_model

TOLERANCE = 1e-10  # float64


def tokens(*lengths, seed=1, vocab=61):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=generator) for n in lengths]


def padded(rows, side, width=None):
    """ids, mask [B, width]; side 'left', 'right', or 'middle': after half of each row."""
    width = width or max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        places = {
            "left": torch.arange(width - len(row), width),
            "right": torch.arange(len(row)),
            "middle": torch.cat((torch.arange(len(row) // 2), torch.arange(width - len(row) + len(row) // 2, width))),
        }[side]
        ids[i, places], mask[i, places] = row, 1
    return ids, mask


@torch.no_grad()
def alone(model, rows):
    return [model(row[None]).logits[0] for row in rows]


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padded_rows_equal_unpadded_rows(small, side):
    rows = tokens(1, 2, 5, 19, 30)
    ids, mask = padded(rows, side, 33)
    with torch.no_grad():
        logits = small(ids, attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    for i, expected in enumerate(alone(small, rows)):
        torch.testing.assert_close(logits[i, mask[i].bool()], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_of_padded_rows_counts_what_unpadded_rows_count(small, side):
    rows = tokens(4, 17, 26)
    ids, mask = padded(rows, side)
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        loss = small(ids, attention_mask=mask, labels=labels).loss
        losses = [small(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows]
    torch.testing.assert_close(loss, sum(losses) / sum(len(row) - 1 for row in rows), rtol=1e-10, atol=0)


def test_padding_gets_no_gradient(small):
    ids, mask = padded(tokens(5, 12), "left")
    embeddings = small.get_input_embeddings()(ids).detach().requires_grad_()
    small(inputs_embeds=embeddings, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    assert not embeddings.grad[mask == 0].any()
    assert embeddings.grad[:, :-1][mask[:, :-1] == 1].abs().sum(-1).all()  # the last token predicts nothing
    small.zero_grad()


@pytest.mark.parametrize(
    "side, settings",
    [
        ("left", {}),
        ("left", {"num_beams": 3}),
        ("left", {"use_cache": False}),
        ("right", {}),
        ("right", {"num_beams": 3}),
    ],
    ids=lambda value: str(value),
)
def test_batched_generation_equals_one_by_one_beyond_the_window(small, side, settings):
    """Prompts shorter and longer than the window (6) and meta tokens (3); 15 new tokens pass it in every row."""
    rows = tokens(1, 4, 9, 23)
    ids, mask = padded(rows, side)
    common = dict(max_new_tokens=15, do_sample=False, eos_token_id=None, pad_token_id=0, **settings)
    common |= dict(output_logits="num_beams" not in settings, return_dict_in_generate=True)
    batch = small.generate(ids, attention_mask=mask, **common)
    assert isinstance(batch.past_key_values, HymbaCache) == settings.get("use_cache", True)
    for i, row in enumerate(rows):
        one = small.generate(row[None], attention_mask=torch.ones(1, len(row), dtype=torch.int64), **common)
        assert torch.equal(batch.sequences[i, ids.shape[1] :], one.sequences[0, len(row) :])
        for step in range(15 if common["output_logits"] else 0):
            torch.testing.assert_close(batch.logits[step][i], one.logits[step][0], rtol=0, atol=1e-5)  # kept in float32


def test_sampling_with_a_seed_is_the_same_with_and_without_a_cache(small):
    ids, mask = padded(tokens(3, 11), "left")
    settings = dict(do_sample=True, top_p=0.9, temperature=1.3, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        found.append(small.generate(ids, attention_mask=mask, use_cache=use_cache, **settings))
    assert torch.equal(*found)


@pytest.mark.parametrize("changes", [{}, {"num_memory_tokens": 0}, {"sliding_window": None}], ids=str)
@pytest.mark.parametrize("chunks", [[1] * 40, [7, 1, 1, 20, 1, 10], [3, 37]], ids=["steps", "mixed", "two"])
def test_cached_passes_equal_one_pass(changes, chunks):
    """One token at a time, and several at a time into a cache that holds some: all 40 logits, window 6."""
    model = make_model(**changes)
    rows = torch.stack(tokens(40, 40))
    cache, found = HymbaCache(model.config), []
    with torch.no_grad():
        for chunk in rows.split(chunks, dim=1):
            found.append(model(chunk, past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(found, 1), model(rows).logits, rtol=0, atol=TOLERANCE)
    assert cache.get_seq_length() == 40


def test_padding_within_later_chunks_leaves_rows_alone(small):
    """Row 0 gets no token in the second pass, row 1 none in the third."""
    first, second = tokens(8, 8)
    passes = [
        (torch.stack((first[:3], second[:3])), torch.ones(2, 3)),
        (torch.stack((first[:2], second[3:5])), torch.tensor([[0, 0], [1, 1]])),
        (torch.stack((first[3:4], second[:1])), torch.tensor([[1], [0]])),
        (torch.stack((first[4:8], second[4:8])), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])),
    ]
    cache, found = HymbaCache(small.config), [[], []]
    masks = torch.zeros(2, 0)
    with torch.no_grad():
        for ids, mask in passes:
            masks = torch.cat((masks, mask), 1)
            logits = small(ids, attention_mask=masks, past_key_values=cache, use_cache=True).logits
            for row in range(2):
                found[row].append(logits[row, mask[row].bool()])
        for row, sequence in enumerate((first, second)):
            expected = small(sequence[None]).logits[0]
            torch.testing.assert_close(torch.cat(found[row]), expected, rtol=0, atol=TOLERANCE)


def test_published_decode_window_sees_one_key_fewer(small):
    """A full pass whose last query alone sees W - 1 back is what published decoding computes."""
    rows = torch.stack(tokens(20, 20))
    model = make_model(decode_window="published")
    narrow = make_model(sliding_window=5)  # only differs by W
    with torch.no_grad():
        assert torch.equal(model(rows).logits, small(rows).logits)
        cache = HymbaCache(model.config)
        steps = torch.cat([model(t, past_key_values=cache, use_cache=True).logits for t in rows.split(1, 1)], 1)
        torch.testing.assert_close(steps, narrow(rows).logits, rtol=0, atol=TOLERANCE)
        assert (steps - small(rows).logits).abs().max() > 0.01


def test_the_cache_is_what_the_architecture_promises():
    model = make_model(dtype=torch.bfloat16)
    cache, config = model(torch.stack(tokens(50, 50)), use_cache=True).past_key_values, model.config
    assert sorted(cache.kv) == [0, 1, 4, 5]  # layers 2 and 3 use the keys of 1
    for i, (k, v, meta_k, meta_v) in cache.kv.items():
        slots = cache.capacity if i in config.global_attn_idx else config.sliding_window + 1
        assert k.shape == (2, 2, slots, 8) and v.shape == (2, 2, slots, 16)
        assert meta_k.shape == (2, 3, 8) and meta_v.shape == (2, 3, 16)
    assert all(t.shape == (2, 3, 64) for t in cache.conv.values()) and len(cache.conv) == 6
    assert all(t.shape == (2, 64, 4) and t.dtype is torch.float32 for t in cache.ssm.values())
    assert not any(t.requires_grad for entry in cache.kv.values() for t in entry)


def test_decoding_moves_no_buffer(small):
    """With room made for them, steps and chunks write into the tensors that are there: a captured graph stays valid."""
    rows = torch.stack(tokens(40, 40))
    cache = HymbaCache(small.config, max_length=40)

    def places():
        tensors = [t for entry in cache.kv.values() for t in entry]
        return [t.data_ptr() for t in (*tensors, *cache.conv.values(), *cache.ssm.values(), cache.lengths)]

    with torch.no_grad():
        small(rows[:, :10], past_key_values=cache, use_cache=True)
        before = places()
        for chunk in rows[:, 10:].split([1, 1, 20, 1, 1, 6], 1):
            small(chunk, past_key_values=cache, use_cache=True)
        cache.reorder_cache(torch.tensor([1, 0]))
    assert places() == before and cache.capacity == 40


def test_reordered_and_copied_caches_continue_as_their_rows(small):
    rows = torch.stack(tokens(15, 15))
    cache = HymbaCache(small.config)
    with torch.no_grad():
        small(rows[:, :10], past_key_values=cache, use_cache=True)
        other = copy.deepcopy(cache)
        expected = small(rows[:, 10:], past_key_values=cache, use_cache=True).logits
        other.reorder_cache(torch.tensor([1, 0]))
        found = small(rows.flip(0)[:, 10:], past_key_values=other, use_cache=True).logits
    torch.testing.assert_close(found.flip(0), expected, rtol=0, atol=TOLERANCE)


def test_generation_goes_on_from_the_cache_it_returned(small):
    """A conversation: what is new is one token or several, behind a batch that is padded on the left."""
    ids, mask = padded(tokens(5, 12), "left")
    settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    for num_new in (1, 4):
        first = small.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings)
        assert isinstance(first.past_key_values, HymbaCache)
        longer = torch.cat((first.sequences, torch.stack(tokens(num_new, num_new, seed=2))), 1)
        longer_mask = torch.cat((mask, mask.new_ones(2, longer.shape[1] - ids.shape[1])), 1)
        expected = small.generate(longer, attention_mask=longer_mask, **settings)
        found = small.generate(longer, attention_mask=longer_mask, past_key_values=first.past_key_values, **settings)
        assert torch.equal(found, expected)


def test_generation_from_embeddings(small):
    (row,) = tokens(9)
    ids, settings = row[None], dict(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = small.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, 9:]
    for use_cache in (True, False):
        found = small.generate(
            inputs_embeds=small.get_input_embeddings()(ids), attention_mask=torch.ones_like(ids), use_cache=use_cache,
            **settings,
        )  # fmt: skip
        assert torch.equal(found, expected)


def test_foreign_caches_and_masks_are_refused(small):
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="HymbaCache"):
        small(ids, past_key_values=(1,))
    with pytest.raises(ValueError, match="attention_mask"):
        small(ids, attention_mask=torch.ones(1, 1, 2, 2))
    with pytest.raises(ValueError, match="output_attentions"):
        small(ids, output_attentions=True)
