"""Run as ``python -I fresh_process.py EXPORT REQUESTS ANSWERS`` in an empty directory: what a user of an export does.

Neither hymba_train nor Megatron-Core can be imported here. REQUESTS is a JSON object: ids (rows), mask (rows or null),
new_tokens, text (or null). ANSWERS gets the results as JSON.
"""

import json
import sys


class Blocked:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("hymba_train", "megatron", "data_prep", "tests"):
            raise ImportError(f"{name} is not installed on this machine")


def main(export, requests, answers):
    sys.meta_path.insert(0, Blocked)
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
    ids = torch.tensor(asked["ids"])
    mask = torch.ones_like(ids) if asked["mask"] is None else torch.tensor(asked["mask"])
    settings = dict(max_new_tokens=asked["new_tokens"], do_sample=False, eos_token_id=None)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    found = {
        "transformers": transformers.__version__,
        "module": type(model).__module__,
        "left_over": sorted(k for k, v in info.items() if v),
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
    if asked["text"] is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(export)
        found["encoded"] = tokenizer(asked["text"]).input_ids
        found["decoded"] = tokenizer.decode(found["encoded"], skip_special_tokens=True)
        found["padding_side"] = tokenizer.padding_side
    with open(answers, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
