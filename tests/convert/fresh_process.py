"""What a user of an export does: ``python -I fresh_process.py EXPORT REQUESTS ANSWERS`` in an empty directory, python
being that of a virtual environment that holds neither hymba_train nor Megatron-Core.

REQUESTS is a list of JSON objects: ids (rows), mask (rows or null), new_tokens, text (or null). ANSWERS gets a list of
results.
"""

import importlib.util
import json
import sys


def main(export, requests, answers):
    for name in ("hymba_train", "megatron", "data_prep", "launch", "tests"):
        assert importlib.util.find_spec(name) is None, f"{name} can be imported here"
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    with open(requests) as file:
        asked = json.load(file)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        export, trust_remote_code=True, output_loading_info=True
    )
    model.eval()
    facts = {
        "transformers": transformers.__version__,
        "module": type(model).__module__,
        "left_over": sorted(k for k, v in info.items() if v),
    }
    with open(answers, "w") as file:
        json.dump([facts | answer(torch, transformers, model, export, **request) for request in asked], file)


def answer(torch, transformers, model, export, ids, mask, new_tokens, text):
    ids = torch.tensor(ids)
    mask = torch.ones_like(ids) if mask is None else torch.tensor(mask)
    settings = dict(max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    found = {
        "logits": logits.tolist(),
        "generated": model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :].tolist(),
        "uncached": model.generate(ids, attention_mask=mask, use_cache=False, **settings)[:, ids.shape[1] :].tolist(),
        "one_by_one": [
            model.generate(row[real][None], attention_mask=mask.new_ones(1, int(real.sum())), **settings)[
                0, int(real.sum()) :
            ].tolist()
            for row, real in zip(ids, mask.bool(), strict=True)
        ],
    }
    if text is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(export)
        found["encoded"] = tokenizer(text).input_ids
        found["decoded"] = tokenizer.decode(found["encoded"], skip_special_tokens=True)
        found["padding_side"] = tokenizer.padding_side
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
