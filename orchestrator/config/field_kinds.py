"""Whether a value is of the kind its field wants, before pydantic turns one kind into another: `yes` is no number and 1 no yes."""

from __future__ import annotations

import types
import typing
from typing import Any, Literal

from orchestrator.config import yaml_text


def options(annotation: Any) -> tuple[Any, ...]:
    """The types a field may have, unions taken apart."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(inner for part in typing.get_args(annotation) for inner in options(part))
    return (annotation,)


def checked(annotation: Any, value: Any, *, empty: bool = False) -> Any:
    """The value, a number or truth value written as a text (as a variable gives it) as what it says.

    Raises ValueError for a truth value where a number or a text is wanted, a number where a truth value or a text is, a text that is no
    such number, and (but for `empty`) an empty text. Other kinds are left to pydantic.
    """
    kinds = options(annotation)
    numbers = [kind for kind in kinds if kind in (int, float)]
    if isinstance(value, list | tuple):
        inner = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) in (tuple, list)]
        return [checked(inner[0], item) for item in value] if inner and inner[0] in (int, float, bool, str) else value
    if isinstance(value, bool):
        if bool in kinds or Any in kinds:
            return value
        if numbers:
            raise ValueError(f"a number is wanted, and {'yes/true/on' if value else 'no/false/off'} is none; write the number")
        if str in kinds:
            raise ValueError(f"a text is wanted, and it was read as {str(value).lower()}; put it in quotes")
    elif isinstance(value, int | float):
        if kinds == (bool,):
            raise ValueError("true or false is wanted, not a number")
        if not numbers and (str in kinds) and dict not in kinds:
            raise ValueError("a text is wanted, and it was read as a number; put it in quotes")
    elif isinstance(value, str):
        return _written(kinds, numbers, value, empty)
    return value


def _written(kinds: tuple[Any, ...], numbers: list[Any], value: str, empty: bool) -> Any:
    """A text for what it says, where the field wants no text."""
    if any(kind is str or typing.get_origin(kind) is Literal for kind in kinds):
        if str in kinds and not empty and not value.strip():
            raise ValueError("the text is empty; give one, or " + ("null for none" if type(None) in kinds else "leave the key out"))
        return value
    if bool in kinds and value in ("true", "false"):
        return value == "true"
    if numbers and (yaml_text.INTEGER.match(value) or yaml_text.FLOAT.match(value)) and len(value) < 40:
        return yaml_text.parse(value, "the text")
    if bool in kinds or numbers:
        raise ValueError("a number is wanted" if numbers else "true or false is wanted")
    return value
