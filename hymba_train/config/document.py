"""Documentation of every key, taken from the schema itself: the string under a field is its meaning."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from dataclasses import dataclass

import yaml

from hymba_train.config import schema
from hymba_train.config.typed import schema_fields, schema_of_names, type_name, with_name


@dataclass(frozen=True)
class KeyDoc:
    """One key: dotted name (NAME stands for a name the user chooses), type, default as YAML, meaning."""

    key: str
    type: str
    default: str
    meaning: str


@functools.cache
def _meanings() -> dict[tuple[str, str], str]:
    """(class name, field name) -> the string below the field."""
    found: dict[tuple[str, str], str] = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for item, after in zip(node.body, node.body[1:], strict=False):
            match item, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[node.name, name] = " ".join(text.split())
    return found


def key_docs() -> list[KeyDoc]:
    """Every key of the schema, in its order."""
    docs: list[KeyDoc] = []
    for key, cls, name, annotation in schema_fields():
        value = getattr(cls(), name)
        default = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
        default = "to be given" if value == schema.TO_BE_GIVEN else default
        kind = "mapping of names to what follows" if schema_of_names(annotation) else type_name(annotation)
        docs.append(KeyDoc(key, kind, default, _meanings().get((cls.__name__, name), "")))
    return docs


def meaning_of(key: str) -> str:
    """Meaning of a dotted key; names the user chose are found too (``data.phases.stable.tokens``)."""
    return next((doc.meaning for doc in key_docs() if doc.key == with_name(key)), "")


def document_keys() -> str:
    """All keys as text: ``key (type, default): meaning``, one group after the other (``hymba train --help-keys``)."""
    lines: list[str] = []
    group = None
    for doc in key_docs():
        if doc.key.partition(".")[0] != group:
            group = doc.key.partition(".")[0]
            lines += ["", group]
        lines.append(f"  {doc.key} ({doc.type}; default {doc.default})")
        lines += textwrap.wrap(doc.meaning, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines[1:]) + "\n"


def document_keys_markdown() -> str:
    """All keys as Markdown tables, one a group, for docs/."""
    lines: list[str] = []
    group = None
    for doc in key_docs():
        if doc.key.partition(".")[0] != group:
            group = doc.key.partition(".")[0]
            lines += ["", f"## {group}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        meaning = doc.meaning.replace("|", "\\|")
        lines.append(f"| `{doc.key}` | {doc.type} | `{doc.default}` | {meaning} |")
    return "\n".join(lines[1:]) + "\n"
