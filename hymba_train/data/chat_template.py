"""The chat template of the published instruct model: conversations as text, and as Jinja for tokenizer files.

A header for the system's text, tools and contexts, then a turn a message. The ``<extra_id_n>`` marks are ordinary text
of several tokens, not entries of the vocabulary. A text has no token in front of it, as with
``apply_chat_template(..., tokenize=True)``; training data end a conversation with the end-of-document token, on which
generation stops.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

ROLES = {"user": "User", "assistant": "Assistant", "tool": "Tool"}
ANSWERS = "assistant"

CHAT_TEMPLATE = (
    "{{ '<extra_id_0>System' }}"
    "{% for message in messages if message['role'] == 'system' %}"
    "{{ '\\n' + message['content'].strip() }}{% if tools or contexts %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% for tool in tools or [] %}{{ '\\n<tool> ' + tool | tojson + ' </tool>' }}{% endfor %}"
    "{% if tools and contexts %}{{ '\\n' }}{% endif %}"
    "{% for context in contexts or [] %}{{ '\\n<context> ' + context.strip() + ' </context>' }}{% endfor %}"
    "{{ '\\n\\n' }}"
    "{% for message in messages if message['role'] in ['user', 'assistant', 'tool'] %}"
    "{{ '<extra_id_1>' + message['role'].capitalize() + '\\n' + message['content'].strip() + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<extra_id_1>Assistant\\n' }}{% endif %}"
)
"""Jinja for tokenizer_config.json. Renders what :func:`render` does; a test holds the two together."""

TEMPLATE_SHA256 = hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()
GENERATION_PROMPT = "<extra_id_1>Assistant\n"


def render(
    messages: Sequence[Mapping[str, str]], tools: Sequence[Any] = (), contexts: Sequence[str] = ()
) -> list[tuple[str, int | None]]:
    """A conversation as consecutive pieces of text: (text, number of the message that it answers with, or None).

    An answer's piece is its text and the newline behind it: what a model must write after the header of the turn.

    Raises ValueError for a role that the template does not know, or a system message that is not the first.
    """
    head = "<extra_id_0>System"
    turns: list[tuple[str, int | None]] = []
    for number, message in enumerate(messages):
        role, text = message["role"], message["content"].strip()
        if role == "system":
            if number:
                raise ValueError(f"message {number} is a system message, which can only be the first")
            head += f"\n{text}" + ("\n" if tools or contexts else "")
        elif role not in ROLES:
            raise ValueError(f"message {number} has the role {role!r}; known are system, {', '.join(ROLES)}")
        elif role == ANSWERS:
            turns += [(GENERATION_PROMPT, None), (f"{text}\n", number)]
        else:
            turns.append((f"<extra_id_1>{ROLES[role]}\n{text}\n", None))
    head += "".join(f"\n<tool> {json.dumps(tool, ensure_ascii=False)} </tool>" for tool in tools)
    head += "\n" if tools and contexts else ""
    head += "".join(f"\n<context> {context.strip()} </context>" for context in contexts)
    return [(f"{head}\n\n", None), *turns]


def prompt_text(text: str) -> str:
    """One question of a user, up to where the answer begins."""
    pieces = render([{"role": "user", "content": text}])
    return "".join(piece for piece, _ in pieces) + GENERATION_PROMPT
