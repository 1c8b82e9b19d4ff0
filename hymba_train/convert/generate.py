"""``hymba generate``: text from prompts, in batches of different lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from hymba_train.convert.load import LoadedModel
from hymba_train.data.chat_template import prompt_text
from hymba_train.errors import UserError


def generate(
    loaded: LoadedModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_beams: int = 1,
    batch_size: int = 8,
    seed: int = 0,
    chat: bool = False,
) -> Iterator[str]:
    """Continuations of ``prompts``, in their order, without the prompts.

    Greedy at temperature 0, else sampled from the smallest set of tokens with probability ``top_p``. A prompt without
    tokens starts from the token that begins a text. Ends at the end-of-document token. ``chat``: prompts are questions
    of a user, put into the template of the instruct model; continuations are its answers. Raises UserError for settings
    that cannot be.
    """
    if max_new_tokens < 1 or batch_size < 1 or num_beams < 1:
        raise UserError("--max-new-tokens, --batch-size and --num-beams: give at least 1")
    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError("--temperature: give 0 or more; --top-p: give a share above 0, up to 1")
    tokenizer, ids = loaded.require_tokenizer(), loaded.token_ids
    start = tokenizer.eod_id if tokenizer.bos_id is None else tokenizer.bos_id
    add_bos = loaded.adds_bos and tokenizer.bos_id is not None and not chat  # conversations are trained without
    prompts = [prompt_text(prompt) for prompt in prompts] if chat else prompts
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    torch.manual_seed(seed)
    for first in range(0, len(prompts), batch_size):
        rows = [tokenizer.encode(p, add_bos=add_bos) or [start] for p in prompts[first : first + batch_size]]
        width = max(map(len, rows))
        tokens = torch.tensor([[ids.pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        device = loaded.model.device
        out = loaded.model.generate(
            tokens.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens, num_beams=num_beams,
            **{"do_sample": False, **sampling}, use_cache=True, eos_token_id=tokenizer.eod_id, pad_token_id=ids.pad,
        )  # fmt: skip
        for prompt, new in zip(rows, out[:, width:].tolist(), strict=True):
            new = new[: new.index(tokenizer.eod_id)] if tokenizer.eod_id in new else new
            before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + new)
            # Alone, the first new token would lose the space in front of it.
            yield whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new)
