"""Pydantic's kinds of errors in plain words, each with what to write instead."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

WORDS = {
    "string_type": "a text is wanted; put it in quotes",
    "bool_type": "true or false is wanted",
    "bool_parsing": "true or false is wanted",
    "int_type": "a whole number is wanted",
    "int_parsing": "a whole number is wanted",
    "int_from_float": "a whole number is wanted",
    "int_parsing_size": "the number is too large",
    "float_type": "a number is wanted",
    "float_parsing": "a number is wanted",
    "finite_number": "a finite number is wanted",
    "dict_type": "a mapping is wanted; write {{key: value}}, or leave the key out",
    "model_type": "a mapping of keys is wanted; write {{key: value}}, or leave the key out",
    "model_attributes_type": "a mapping of keys is wanted; write {{key: value}}, or leave the key out",
    "too_short": "at least {min_length} must be named",
    "too_long": "at most {max_length} may be named, not {actual_length}",
    "string_too_long": "at most {max_length} characters are taken",
    "string_too_short": "at least {min_length} characters are wanted",
    "greater_than": "it must be greater than {gt}",
    "greater_than_equal": "it must be at least {ge}",
    "less_than": "it must be less than {lt}",
    "less_than_equal": "it must be at most {le}",
}
"""type of error -> sentence, filled with the error's own limits."""

LISTS = {
    "recipes": "a list of recipes is wanted, each a list of strategies; write [[full]] or [[freeze_layers, lora], [full]]",
    "recipes.*": "a recipe is a list of strategies; write [[full]] instead of [full]",
    "search.seeds": "a whole number (how many seeds) or a list of seeds is wanted; write 3 or [0, 1, 2]",
    "safety.suites": "a list of suites is wanted; write [{name: ..., data: ...}]",
    "safety.external": "a list of tasks is wanted; write [{name: ..., harness: ..., task: ...}]",
}
STRATEGY = "the name of a strategy or {name: {knob: value}} is wanted"
ONE_OF = {
    "recipes.*.*": STRATEGY,
    "monitor.on_breach.add": STRATEGY,
    "monitor.on_breach": "log, stop, rollback or add <strategy> is wanted",
    "safety.judge": "the name of a judge or {name: ..., option: ...} is wanted",
    "safety.second_judge": "the name of a judge, {name: ..., option: ...} or null is wanted",
}
"""What a key takes that may be of several kinds."""


def sentence(detail: Mapping[str, Any], key: str) -> str:
    """The words for one error of pydantic's at a dotted key; pydantic's own where there are none."""
    kind, limits = detail["type"], detail.get("ctx") or {}
    general = _general(key)
    if general in ONE_OF:
        return ONE_OF[general]
    if kind in ("tuple_type", "list_type"):
        return LISTS.get(general, "a list is wanted; write [...]")
    if kind == "string_pattern_mismatch":
        return _pattern(key)
    if kind == "literal_error":
        return f"one of {str(limits.get('expected', '')).replace(chr(39), '')} is wanted"
    if kind == "string_type" and isinstance(detail.get("input"), dict | list | tuple):
        return "a text is wanted, not a list or mapping"
    if kind == "string_type" and detail.get("input") is None:
        return "a text is wanted, not null; give one, or leave the key out"
    if kind in WORDS:
        return WORDS[kind].format(**{name: _number(value) for name, value in limits.items()})
    return detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")


def _general(key: str) -> str:
    """The key with stars for places in lists."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", key)


def _number(value: Any) -> Any:
    return f"{value:g}" if isinstance(value, float) else value


def _pattern(key: str) -> str:
    if key == "name":
        return "letters a-z and A-Z, digits, dot, underscore and hyphen are taken, beginning with a letter or digit"
    return "a name may hold no slash, backslash or control character, begin with no dot and have no blank at an end"


def merged(details: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[Mapping[str, Any]]:
    """One error for each key that may be of several kinds; pydantic tells one for each kind.

    Of a key whose kind was found (a mapping with a wrong key in it) the errors inside it are kept.
    """
    inside = {".".join(parts[:k]) for parts in (key.split(".") for key in keys) for k in range(1, len(parts))}
    found, seen = [], set()
    for detail, key in zip(details, keys, strict=True):
        if detail["type"] == "too_short" and key in inside:
            continue  # it counts only what was right
        if _general(key) in ONE_OF:
            if key in seen or key in inside:
                continue
            seen.add(key)
        found.append(detail)
    return found
