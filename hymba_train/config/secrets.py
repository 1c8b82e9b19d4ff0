"""Secrets stay out of configurations: those are copied into run directories, checkpoints, logs and trackers.

Programs take keys and tokens from the environment (WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY, ...). Free of torch.
"""

from __future__ import annotations

import re
from typing import Any

NAME = re.compile(r"TOKEN(?!IZER)|SECRET|PASSW|API_?KEY|ACCESS_?KEY|CREDENTIAL|_KEY$", re.IGNORECASE)
"""Matches names of environment variables that hold secrets."""
_FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([^,}\s]+)")
_USER_IN_URL = re.compile(r"\w://[^/\s?#]*@")
_SIGNED_URL = re.compile(r"\w://\S*[?&][^=&\s]*(?:sig|token|secret|password|key)[^=&\s]*=", re.IGNORECASE)


def secrets_from_environment(plain: Any, prefix: str = "") -> list[str]:
    """A line for each key whose unresolved value takes a secret out of the environment."""
    return [
        f"{key}: takes {name} from the environment into the configuration, which is written to disk; leave it out: "
        "programs read their keys from the environment themselves"
        for key, text in _texts(plain, prefix)
        for name in _FROM_ENVIRONMENT.findall(text)
        if NAME.search(name)
    ]


def secrets_in_urls(plain: Any, prefix: str = "") -> list[str]:
    """A line for each key whose value is a URL with a password or a signature; the value itself is not repeated."""
    return [
        f"{key}: is a URL with credentials, and the configuration is written to disk; give the URL without them, and "
        "the credentials through the environment"
        for key, text in _texts(plain, prefix)
        if _USER_IN_URL.search(text) or _SIGNED_URL.search(text)
    ]


def _texts(value: Any, key: str) -> list[tuple[str, str]]:
    if isinstance(value, str):
        return [(key, value)]
    if isinstance(value, dict):
        return [t for k, v in value.items() for t in _texts(v, f"{key}.{k}" if key else str(k))]
    if isinstance(value, list):
        return [t for v in value for t in _texts(v, key)]
    return []
