"""Imported by the fork server of a comparison, and by nothing else: it then ends with the comparison, however it does.

Python's server ends when nobody can ask it for forks any more, and its forks can: killed, a comparison would leave them
training. With the server gone they save and stop (:func:`hymba_train.compare.child.train_run`). Free of torch.
"""

from __future__ import annotations

import os

from hymba_train.checkpoint.children import die_with

die_with(os.getppid())
