"""Plain data <-> typed configuration, with strict checks. Every problem is reported, not just the first."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator
from typing import Any, TypeGuard

from hymba_train.config.nearest import did_you_mean
from hymba_train.config.schema import TO_BE_GIVEN, Config, Plain
from hymba_train.config.secrets import secrets_in_urls
from hymba_train.errors import UserError


def is_schema(annotation: Any) -> TypeGuard[type]:
    """Whether a field's type is a dataclass, whose fields are keys of their own."""
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name -> type of a schema dataclass, in the order of the schema."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def from_plain(plain: Plain, cls: type = Config) -> Any:
    """Typed configuration from nested dicts, lists and scalars; ``cls`` is its schema, that of a run unless said.

    Keys that are absent take the schema's default; ``"???"`` is kept wherever it stands. An int is taken for a float,
    and a whole float such as 1e12 for an int; nothing else is converted.

    Raises UserError with one line for every unknown key, every value of the wrong type, and every URL with a password.
    """
    problems: list[str] = []
    config = _build(cls, plain, "", problems, cls)
    problems += secrets_in_urls(plain)
    if problems:
        raise UserError(*problems)
    return config


def to_plain(config: Any) -> Plain:
    """Nested dicts, lists and scalars of a configuration (or a part of it), in the order of the schema."""
    return dataclasses.asdict(config)


def to_be_given(config: Config) -> list[str]:
    """Dotted keys that still hold ``"???"``."""
    return [key for key, value in flatten(to_plain(config)).items() if value == TO_BE_GIVEN]


def flatten(plain: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> leaf value. Lists and empty dicts are leaves."""
    if not isinstance(plain, dict) or not plain:
        return {prefix: plain}
    leaves: dict[str, Any] = {}
    for key, value in plain.items():
        leaves.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return leaves


def type_name(annotation: Any) -> str:
    """How an error line or the key list names a type: ``int``, ``list of str``, ``float or null``."""
    if annotation is type(None):
        return "null"
    if is_schema(annotation):
        return f"mapping with {', '.join(field_types(annotation))}"
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_name(a) for a in args)
    if origin is list:
        return f"list of {type_name(args[0])}"
    if origin is dict:
        return f"mapping of names to {f'({type_name(args[1])})' if is_schema(args[1]) else type_name(args[1])}"
    return "text" if annotation is str else annotation.__name__


class _Mismatch(Exception):
    pass


def _build(cls: type, plain: Any, prefix: str, problems: list[str], root: type) -> Any:
    if not isinstance(plain, dict):
        problems.append(f"{prefix}: expected {type_name(cls)}; got {_show(plain)}")
        return cls()
    known = field_types(cls)
    values: dict[str, Any] = {}
    for key, value in plain.items():
        dotted = f"{prefix}.{key}" if prefix else str(key)
        if str(key).startswith("_"):
            problems.append(_private(dotted))
            continue
        if key not in known:
            nearby = [f"{prefix}.{k}" if prefix else k for k in known]
            problems.append(_unknown(dotted, nearby, root))
            continue
        values[key] = _convert_field(known[key], value, dotted, problems, root)
    return cls(**{k: v for k, v in values.items() if v is not _INVALID})


_INVALID = object()


def _convert_field(annotation: Any, value: Any, dotted: str, problems: list[str], root: type) -> Any:
    if is_schema(annotation):
        return _build(annotation, value, dotted, problems, root)
    if typing.get_origin(annotation) is dict and isinstance(value, dict):
        element = typing.get_args(annotation)[1]
        converted = {}
        for name, item in value.items():
            if not isinstance(name, str) or not name or "." in name:
                problems.append(f"{dotted}: name {name!r} must be text without dots")
                continue
            if name.startswith("_"):
                problems.append(_private(f"{dotted}.{name}"))
                continue
            converted[name] = _convert_field(element, item, f"{dotted}.{name}", problems, root)
        return {k: v for k, v in converted.items() if v is not _INVALID}
    try:
        return _convert(annotation, value)
    except _Mismatch:
        problems.append(
            f"{dotted}: expected {type_name(annotation)}; got {_show(value)}{_hint(annotation, value, dotted)}"
        )
        return _INVALID


def _convert(annotation: Any, value: Any) -> Any:
    """``value`` as ``annotation``; raises _Mismatch."""
    if isinstance(value, str) and value == TO_BE_GIVEN:
        return value
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        for option in args:
            if option is not type(None):
                return _convert(option, value)  # the schema has unions with None only
    if origin is list:
        if not isinstance(value, list):
            raise _Mismatch
        return [_convert(args[0], item) for item in value]
    if annotation is bool and isinstance(value, bool):
        return value
    if annotation is str and isinstance(value, str):
        return value
    if annotation in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if annotation is float and math.isfinite(value):
            return float(value)
        if annotation is int and float(value).is_integer():
            return int(value)
    raise _Mismatch


def _hint(annotation: Any, value: Any, dotted: str) -> str:
    """What to write instead, where that can be guessed."""
    from hymba_train.config.choices import choices_of

    choices, name = choices_of(dotted), type_name(annotation)
    if choices:
        return f"; choose one of {', '.join(choices)}{' or null' if 'null' in name else ''}"
    if name.startswith("bool"):
        return "; write true or false"
    if name.startswith("list of") and not isinstance(value, (list, dict, type(None))):
        return f"; write {dotted}=[{value}]"
    if name.startswith(("int", "float")) and isinstance(value, str):
        return _number(value, name)
    if isinstance(value, bool):
        return ""
    if isinstance(value, (int, float)) and "text" in name:
        return f' (in a file write "{value}"; on the command line KEY=\'"{value}"\')'
    if isinstance(value, float) and not math.isfinite(value):
        return " (must be finite)"
    return ""


_UNITS = {"%": 1e-2, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def _number(text: str, name: str) -> str:
    """'; write 32e3' for 32k; nothing for what is no number with a unit."""
    number, unit = text[:-1].strip(), text[-1:].lower()
    try:
        value = float(number) * _UNITS[unit]
    except (KeyError, ValueError):
        return ""
    if name.startswith("int") and not value.is_integer():
        return ""
    return f"; write {value:.12g}"


def _show(value: Any) -> str:
    kind = {dict: "mapping", str: "text", type(None): "null"}.get(type(value), type(value).__name__)
    return "null" if value is None else f"{value!r} ({kind})"


def _private(dotted: str) -> str:
    return f"{dotted}: keys that begin with '_' are refused; nothing in a configuration is instantiated or run"


def _unknown(dotted: str, siblings: list[str], root: type) -> str:
    every_key = [*siblings, *(k for k in schema_keys(root) if k not in siblings)]
    tail = did_you_mean(dotted, every_key)
    if tail.startswith("known:"):  # nothing near in the whole schema: show the group alone
        tail = "known here: " + ", ".join(k.rpartition(".")[2] for k in siblings)
    return f"{dotted}: unknown key; {tail}"


def schema_of_names(annotation: Any) -> type | None:
    """Schema of the values of a mapping from names that the user chooses; None for any other type."""
    args = typing.get_args(annotation)
    return args[1] if typing.get_origin(annotation) is dict and is_schema(args[1]) else None


def schema_fields(schema: type = Config, prefix: str = "") -> Iterator[tuple[str, type, str, Any]]:
    """(dotted key, class, field, type) of every key of a schema, in its order. NAME stands for a name the user chooses:
    ``data.phases``, then ``data.phases.NAME.tokens``."""
    for name, annotation in field_types(schema).items():
        dotted = f"{prefix}{name}"
        if is_schema(annotation):
            yield from schema_fields(annotation, f"{dotted}.")
            continue
        yield dotted, schema, name, annotation
        if below := schema_of_names(annotation):
            yield from schema_fields(below, f"{dotted}.NAME.")


@functools.cache
def schema_keys(schema: type = Config) -> tuple[str, ...]:
    """Every dotted key of a schema that has a value of its own."""
    return tuple(key for key, _, _, annotation in schema_fields(schema) if not schema_of_names(annotation))


def with_name(key: str) -> str:
    """A dotted key with NAME for every name that the user chose.

    >>> with_name("data.phases.stable.blend.books")
    'data.phases.NAME.blend.NAME'
    """
    annotation: Any = Config
    parts = []
    for part in key.split("."):
        is_name = typing.get_origin(annotation) is dict
        parts.append("NAME" if is_name else part)
        if is_name:
            annotation = typing.get_args(annotation)[1]
        else:
            annotation = field_types(annotation).get(part) if is_schema(annotation) else None
    return ".".join(parts)
