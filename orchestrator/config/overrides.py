"""`key=value` of the command line: where the key leads, and how its value is to be read.

A key whose type is text takes its value letter by letter: `#`, `: `, `yes`, `2024`, quotes, brackets and spaces mean themselves. Every other
value is YAML, and a comment in it is refused instead of being cut off.
"""

from __future__ import annotations

import copy
import types
import typing
from typing import Any, Literal

from pydantic import BaseModel

from orchestrator.config import yaml_text
from orchestrator.errors import ConfigError, UnknownNameError, brief

FREE = Any
"""The type of a value below a mapping of options: whatever YAML makes of it."""
LONGEST_KEY = 300
MIXED = {"attack", "deepspeed"}
"""Fields that take a list or a mapping beside their own type, before validation: read as YAML where they look like one."""


def apply(raw: dict[str, Any], text: str, root: type[BaseModel], defaults: dict[str, Any] | None = None) -> None:
    """Set one dotted key in place: `search.trials=3`, `safety.suites.0.limit=50`.

    An index into a list that the file does not give refers to the list in `defaults`. Raises ConfigError for what is no key=value, a key
    that there is not (with the nearest), an index that there is not, a value that cannot be read, and a key below a plain value.
    """
    key, sign, value = text.partition("=")
    key = key.strip()
    parts = key.split(".")
    if len(key) > LONGEST_KEY:
        raise ConfigError(f"override {brief(text)}: no key has {len(key)} characters; write key=value, e.g. search.trials=3")
    if not sign or not all(parts):
        raise ConfigError(f"override {brief(text)} is not of the form key=value, e.g. search.trials=3")
    read = value_of(annotation_at(root, parts), value, key)
    node: Any = raw
    default: Any = defaults
    for position, (here, following) in enumerate(zip(parts, parts[1:], strict=False)):
        if isinstance(node, list):
            index = _index(node, here, key)
            default = default[index] if isinstance(default, list) and index < len(default) else None
            if not isinstance(node[index], dict | list):
                raise _below(key, parts[: position + 1], node[index])
            node = node[index]
            continue
        default = default.get(here) if isinstance(default, dict) else None
        if not isinstance(node.get(here), dict | list):
            if node.get(here) is not None:
                raise _below(key, parts[: position + 1], node[here])
            node[here] = copy.deepcopy(default) if following.isdecimal() and isinstance(default, list) else {}
        node = node[here]
    if isinstance(node, list):
        node[_index(node, parts[-1], key)] = read
    else:
        node[parts[-1]] = read


def _below(key: str, parts: list[str], value: Any) -> ConfigError:
    above = ".".join(parts)
    return ConfigError(f"{key}: {above} is {brief(value)} here, which has no keys of its own and would be lost; give {above} as a whole")


def _index(node: list, text: str, key: str) -> int:
    if not node:
        raise ConfigError(f"{key}: the list is empty; give it as a whole, {key.rpartition('.' + text)[0]}=[...]")
    if not (text.isascii() and text.isdecimal()) or len(text) > 9 or int(text) >= len(node):
        raise ConfigError(f"{key}: {text[:40]!r} is no index of a list of {len(node)}; use 0..{len(node) - 1}")
    return int(text)


def annotation_at(root: type[BaseModel], parts: list[str]) -> Any:
    """The type of the value a dotted key leads to; FREE where anything may stand. Raises ConfigError for a key that there is not."""
    found: Any = root
    for position, part in enumerate(parts):
        found = _inside(found, part, parts[: position + 1])
    return found


def _inside(annotation: Any, part: str, parts: list[str]) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if part not in annotation.model_fields:
            raise ConfigError(unknown_key(annotation, parts))
        return str | dict[str, Any] | list if part in MIXED else annotation.model_fields[part].annotation
    inner: list[Any] = []
    for option in _options(annotation):
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if option in (Any, dict, list):
            return FREE
        if origin in (tuple, list) and part.isdecimal():
            inner.append(arguments[0])
        elif origin is dict:
            inner.append(arguments[1])
        elif isinstance(option, type) and issubclass(option, BaseModel):
            inner.append(_inside(option, part, parts))
    if not inner:
        raise ConfigError(f"{'.'.join(parts)}: {'.'.join(parts[:-1])} holds no {part!r}; give it as a whole, {'.'.join(parts[:-1])}=...")
    return inner[0]


def unknown_key(cls: type[BaseModel], parts: list[str]) -> str:
    """The sentence on a key that a section does not have."""
    return str(UnknownNameError("key", ".".join(parts), [".".join([*parts[:-1], name]) for name in cls.model_fields]))


def _options(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(inner for part in typing.get_args(annotation) for inner in _options(part))
    return (annotation,)


def value_of(annotation: Any, text: str, key: str) -> Any:
    """A value of the command line, as its key's type wants it. `null` and nothing are None where the key may be null. Raises ConfigError."""
    options = _options(annotation)
    texts = [option for option in options if option is str or typing.get_origin(option) is Literal]
    if type(None) in options and text.strip() in ("", "null"):
        return None
    structures = any((typing.get_origin(o) or o) in (dict, list, tuple) or isinstance(o, type) and issubclass(o, BaseModel) for o in options)
    if texts and not (structures and text.lstrip()[:1] in ("{", "[")):
        return _clean(text, key)
    if yaml_text.commented(text):
        raise ConfigError(
            f"{key}={brief(text)}: from the # on this would be a comment of YAML and lost; put a text in quotes of its own "
            f"(\"{key}='...'\" in a shell), or leave the comment out"
        )
    return yaml_text.parse(text, f"the value of {key} (a text with signs of YAML in it wants quotes of its own, {key}='...')")


def _clean(text: str, key: str) -> str:
    return yaml_text.plain(text, f"the value of {key}")
