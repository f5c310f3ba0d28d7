"""YAML as a config may be written: plain values only, each key once, nothing read as something else than it looks like.

PyYAML's SafeLoader follows YAML 1.1, where a repeated key silently wins, 010 is 8, 1:30 is 90 and 2024-01-01 a date. Here these are
refused (the first two) or plain texts (the others), and tags other than those of plain values are unknown.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from orchestrator.errors import ConfigError

MOST_BYTES = 300_000
"""Largest config file that is read: seconds."""
MOST_VALUES = 100_000
"""Most values a text may stand for once its aliases are written out."""
MOST_CHARACTERS = 10_000_000
"""Most characters of its texts and keys, counted likewise."""
DEEPEST = 60
"""Deepest nesting."""
LARGEST = 2**63 - 1

FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*[eE][-+]?[0-9]+|[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$")  # noqa: E501
"""Numbers as people, JSON and YAML 1.2 write them: `3e-4` is one."""
INTEGER = re.compile(r"^[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)$")
BOOLEAN = re.compile(r"^(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$")
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """SafeLoader with the rules of this module."""

    yaml_implicit_resolvers: dict = {}
    yaml_constructors: dict = {}

    def fetch_flow_collection_start(self, TokenClass):  # noqa: N803 - PyYAML's name
        """`[` or `{`; PyYAML's time grows with the square of the depth, so that it is watched here."""
        if self.flow_level >= DEEPEST:
            raise RecursionError
        super().fetch_flow_collection_start(TokenClass)

    def add_indent(self, column: int) -> bool:
        if len(self.indents) > 2 * DEEPEST:
            raise RecursionError
        return super().add_indent(column)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys (`<<`), with each key kept once, so that merges of merges do not grow without end."""
        _refuse_repeated(node)
        super().flatten_mapping(node)
        node.value = list({(key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key): (key, value) for key, value in node.value}.values())


_Loader.add_implicit_resolver(f"{_TAG}null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(f"{_TAG}bool", BOOLEAN, list("yYnNtTfFoO"))
_Loader.add_implicit_resolver(f"{_TAG}int", INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver(f"{_TAG}merge", re.compile(r"^(?:<<)$"), ["<"])


def _problem(said: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, said, node.start_mark)


def _refuse_repeated(node: yaml.MappingNode) -> None:
    """Of the keys as written; what a merge brings may be replaced."""
    if getattr(node, "looked_through", False):
        return
    node.looked_through = True
    seen: dict[str, yaml.Node] = {}
    merged: yaml.Node | None = None
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _problem("a key is a list or mapping; write a text", key)
        if key.tag == f"{_TAG}merge":
            if merged is not None:
                raise _problem(
                    f"`<<` stands twice in one mapping, in line {merged.start_mark.line + 1} and in line {key.start_mark.line + 1}; write one, "
                    "<<: [*first, *second]", key,
                )  # fmt: skip
            merged = key
            continue
        if key.tag != f"{_TAG}str":
            raise _problem(f"the key {key.value!r} is no text; put it in quotes if it is meant as one", key)
        if key.value in seen:
            first = seen[key.value].start_mark.line + 1
            raise _problem(
                f"the key {key.value!r} stands twice, in line {first} and in line {key.start_mark.line + 1}, and one would silently replace the "
                "other; keep one, or put what belongs together under one", key,
            )  # fmt: skip
        seen[key.value] = key


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    if not INTEGER.match(text):
        raise _problem(f"{text[:40]!r} is no whole number", node)
    digits = text.lstrip("+-")
    if len(digits) > 40:
        raise _problem(f"a number of {len(digits)} digits; whole numbers go up to {LARGEST}", node)
    if re.match(r"0[0-9]", digits):
        raise _problem(f"{text} with a leading zero is octal to some and decimal to others; write it without, or in quotes for a text", node)
    value = int(text, 0)
    if abs(value) > LARGEST:
        raise _problem(f"the number {text} is too large; whole numbers go up to {LARGEST}", node)
    return value


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    text = loader.construct_scalar(node)
    if re.search("[\ud800-\udfff]", text):
        try:  # as JSON writes an emoji: two halves
            text = text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise _problem("a text holds half of a character (a lone surrogate), which no file can hold; write the whole character", node) from None
    return text


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node)
    if not FLOAT.match(text) and not INTEGER.match(text):
        raise _problem(f"{text[:40]!r} is no number", node)
    text = text.replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _bool(loader: _Loader, node: yaml.ScalarNode) -> bool:
    text = loader.construct_scalar(node)
    if not BOOLEAN.match(text):
        raise _problem(f"{text[:40]!r} is neither true nor false", node)
    return text.lower() in ("yes", "true", "on")


_Loader.add_constructor(f"{_TAG}null", yaml.SafeLoader.construct_yaml_null)
_Loader.add_constructor(f"{_TAG}bool", _bool)
_Loader.add_constructor(f"{_TAG}int", _int)
_Loader.add_constructor(f"{_TAG}float", _float)
_Loader.add_constructor(f"{_TAG}str", _text)
_Loader.add_constructor(f"{_TAG}seq", yaml.SafeLoader.construct_yaml_seq)
_Loader.add_constructor(f"{_TAG}map", yaml.SafeLoader.construct_yaml_map)
_Loader.add_constructor(None, yaml.SafeLoader.construct_undefined)


def parse(text: str, where: str) -> Any:
    """YAML text to plain values (dict with text keys, list, str, int, float, bool, None), none of them shared.

    Raises ConfigError, beginning with `where`, for what is not YAML or breaks a rule of this module; it names the line.
    """
    try:
        found = yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.constructor.ConstructorError as error:
        said = " ".join(str(error.problem).split())
        if said.startswith("could not determine a constructor for the tag"):
            said = f"{said.partition(' for ')[2]} is not known here; only plain texts, numbers, lists and mappings are read"
        line = "" if error.problem_mark is None else f" line {error.problem_mark.line + 1}"
        raise ConfigError(f"{where}{line}: {said}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply or contains itself; {DEEPEST} levels are read") from None
    except (ValueError, OverflowError) as error:  # of PyYAML's scanner: a number or an escape beyond what Python holds
        raise ConfigError(
            f"{where} holds a number or an escape (\\U...) that stands for no character or value ({' '.join(str(error).split())[:200]}); correct it"
        ) from error
    return plain(found, where)


def commented(text: str) -> bool:
    """Whether YAML would leave out an end of this text as a comment."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError):
        return False
    return text[node.end_mark.index :].lstrip().startswith("#") if node is not None else text.lstrip().startswith("#")


def is_mapping(text: str) -> bool:
    """Whether this is YAML whose top is a mapping with something in it, whatever else is wrong with it."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return False
    return isinstance(node, yaml.MappingNode) and bool(node.value)


def plain(value: Any, where: str) -> Any:
    """A copy that shares no part with another. Raises ConfigError for a value that contains itself, is too deep or too large, for keys that are
    no texts, for texts that no file can hold and for numbers that are not finite."""
    left = [MOST_VALUES, MOST_CHARACTERS]
    return _copied(value, where, "", 0, left)


def _copied(value: Any, where: str, key: str, depth: int, left: list[int]) -> Any:
    left[0] -= 1
    if left[0] < 0:
        raise ConfigError(f"{where} stands for more than {MOST_VALUES:,} values once its aliases are written out; write less")
    left[1] -= len(value) if isinstance(value, str) else sum(map(len, filter(_is_text, value))) if isinstance(value, dict) else 0
    if left[1] < 0:
        raise ConfigError(f"{where} stands for more than {MOST_CHARACTERS:,} characters once its aliases are written out; write less")
    if depth > DEEPEST:
        raise ConfigError(f"{where} is nested too deeply or contains itself; {DEEPEST} levels are read")
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                raise ConfigError(f"{where}: the key {name!r} below {key or 'the top'} is no text; put it in quotes")
        return {_holdable(k, where, key): _copied(v, where, f"{key}.{k}" if key else k, depth + 1, left) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(v, where, f"{key}.{i}" if key else str(i), depth + 1, left) for i, v in enumerate(value)]
    if isinstance(value, str):
        return _holdable(value, where, key)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {key + ': ' if key else ''}{value} is no finite number; give one")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _holdable(text: str, where: str, key: str) -> str:
    if "\0" in text:
        raise ConfigError(f"{where}: {key or 'a text'} holds a NUL character, which no name or file may; take it out")
    if re.search("[\ud800-\udfff]", text):
        raise ConfigError(f"{where}: {key or 'a text'} holds half of a character (a lone surrogate, or bytes that are not UTF-8); write the whole")
    return text
