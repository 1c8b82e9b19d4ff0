"""Records of conversations and of preference pairs, in the forms that public collections have.

A conversation: ``{"messages": [{"role": ..., "content": ...}, ...]}``, or ``{"prompt": ..., "completion": ...}``, each
a text or a list of messages. A pair: ``{"prompt": ..., "chosen": ..., "rejected": ...}``, likewise; or without prompt,
both answers being whole conversations. ``tools`` and ``contexts`` may stand beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from data_prep.records import check_text
from hymba_train.data.chat_template import ANSWERS, ROLES

Message = dict[str, str]


@dataclass
class Conversation:
    """``messages`` end with an answer. The first ``num_given`` of them are given: answers among them carry no loss."""

    messages: list[Message]
    num_given: int = 0
    tools: list[Any] = field(default_factory=list)
    contexts: list[str] = field(default_factory=list)


def conversation_of(record: dict[str, Any]) -> Conversation:
    """Conversation of a record. Raises ValueError with the reason why it is none."""
    if "messages" in record:
        messages, num_given = _messages(record["messages"], "messages", "user"), 0
    elif "prompt" in record and "completion" in record:
        given = _messages(record["prompt"], "prompt", "user")
        messages, num_given = given + _messages(record["completion"], "completion", ANSWERS), len(given)
    else:
        raise ValueError("neither 'messages' nor 'prompt' and 'completion' in it")
    return _whole(messages, num_given, record)


def pair_of(record: dict[str, Any]) -> tuple[Conversation, Conversation]:
    """(chosen, rejected) of a record: their common first messages are given. Raises ValueError with the reason."""
    if "chosen" not in record or "rejected" not in record:
        raise ValueError("not a pair: 'chosen' or 'rejected' is missing")
    given = _messages(record["prompt"], "prompt", "user") if "prompt" in record else []
    sides = []
    for key in ("chosen", "rejected"):
        side = _messages(record[key], key, ANSWERS)
        # Some collections repeat the prompt in both answers.
        sides.append(side if side[0]["role"] != ANSWERS else given + side)
    chosen, rejected = sides
    if chosen == rejected:
        raise ValueError("'chosen' and 'rejected' are equal")
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    if same == 0 or chosen[same - 1]["role"] == ANSWERS:
        raise ValueError("'chosen' and 'rejected' do not answer one prompt")
    return _whole(chosen, same, record), _whole(rejected, same, record)


def _messages(value: Any, key: str, role: str) -> list[Message]:
    """Messages of a list of them, or of one text in ``role``."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key!r} is neither a text nor a list of messages")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"message {number} of {key!r} has no 'role' or no 'content'")
        if message["role"] != "system" and message["role"] not in ROLES:
            raise ValueError(
                f"message {number} of {key!r} has the role {message['role']!r}; known are system, {', '.join(ROLES)}"
            )
        messages.append({"role": message["role"], "content": check_text(message["content"], "content").strip()})
    return messages


def _whole(messages: list[Message], num_given: int, record: dict[str, Any]) -> Conversation:
    """Up to the last answer: what follows it is never answered, so it is left out."""
    while messages and messages[-1]["role"] != ANSWERS:
        messages = messages[:-1]
    if len(messages) <= num_given:
        raise ValueError("no message of the assistant to learn from")
    for number, message in enumerate(messages):
        if message["role"] == "system" and number:
            raise ValueError(f"message {number} is a system message, which can only be the first")
        if message["role"] == ANSWERS and number >= num_given and not message["content"]:
            raise ValueError(f"message {number}, an answer, is empty")
    tools, contexts = record.get("tools") or [], record.get("contexts") or []
    if not isinstance(tools, list) or not isinstance(contexts, list):
        raise ValueError("'tools' or 'contexts' is not a list")
    return Conversation(messages, num_given, tools, [check_text(text, "contexts") for text in contexts])
