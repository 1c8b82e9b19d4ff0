"""Configuration: typed schema, composition from recipes/, freezing to one resolved YAML. Free of torch.

``compose(["experiment=demo"]) -> Config``; ``freeze`` and ``load_frozen`` keep it on disk.
"""

from hymba_train.config.compose import compose
from hymba_train.config.document import document_keys, document_keys_markdown, key_docs, meaning_of
from hymba_train.config.freeze import (
    FROZEN_NAME,
    changed_keys,
    data_file,
    freeze,
    freeze_run,
    load_frozen,
    run_directory,
    to_yaml,
)
from hymba_train.config.recipes import group_options, recipes_directory
from hymba_train.config.schema import TO_BE_GIVEN, Config
from hymba_train.config.typed import flatten, from_plain, to_be_given, to_plain

__all__ = [
    "FROZEN_NAME",
    "TO_BE_GIVEN",
    "Config",
    "changed_keys",
    "compose",
    "data_file",
    "document_keys",
    "document_keys_markdown",
    "flatten",
    "freeze",
    "freeze_run",
    "from_plain",
    "group_options",
    "key_docs",
    "load_frozen",
    "meaning_of",
    "recipes_directory",
    "run_directory",
    "to_be_given",
    "to_plain",
    "to_yaml",
]
