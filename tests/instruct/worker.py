"""Several runs in one start of Python, or of torchrun: importing Megatron-Core costs more than training.

python -m tests.instruct.worker ACTIONS.json, a list of [what, overrides or arguments]: train, reference,
export, import.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path


def main(path: str) -> None:
    import torch

    from hymba_train.config import compose
    from hymba_train.convert.from_hf import import_hf
    from hymba_train.convert.to_hf import export_hf
    from hymba_train.errors import UserError
    from hymba_train.parallel import destroy_groups, shutdown
    from hymba_train.plan import make_plan
    from hymba_train.train import main as training
    from hymba_train.train import reference_pass

    training.shutdown = reference_pass.shutdown = destroy_groups  # the default process group serves all runs
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    for what, arguments in json.loads(Path(path).read_text()):
        if what == "import":
            import_hf(*map(Path, arguments))
            continue
        if what == "export":
            export_hf(*map(Path, arguments))
            continue
        config = compose(arguments)
        world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else _world_size()
        try:
            plan = make_plan(config, world_size, needs_reference=what == "train")
            plan.require_complete()
            (training.train if what == "train" else reference_pass.reference)(config, plan)
        except UserError as error:
            print(f"UserError: {error}", flush=True)
            destroy_groups()
    shutdown()


def _world_size() -> int:
    import os

    return int(os.environ.get("WORLD_SIZE", "1"))


if __name__ == "__main__":
    main(sys.argv[1])
