"""Every key of the config file as a Markdown page, from the fields' own descriptions: `python -m orchestrator.config_docs`."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from orchestrator.config import Experiment

HEAD = """# Every key of a config file

Made from the code by `python -m orchestrator.config_docs`. `safebasin config-schema` prints the same as JSON schema for an editor;
`safebasin validate -c FILE` checks a file. Any key can be given on the command line by its dotted name, e.g.
`safebasin run -c job.yaml search.trials=60 safety.limits.max_degradation=0.03`. Unknown keys are
refused, with the nearest ones named. Knobs of strategies stand in [Strategies](strategies.md); `${name}` stands for a variable of
the file or the environment.
"""


def markdown() -> str:
    """The whole page."""
    top, parts = [], []
    for name, field in Experiment.model_fields.items():
        section = _section(field.annotation)
        if section is None:
            top.append(_row(name, field))
        else:
            parts += _tables(name, section)
    return "\n".join([HEAD, *_table(top), *parts]) + "\n"


def _tables(name: str, section: type[BaseModel]) -> Iterator[str]:
    """The section's table, and those of the sections inside it."""
    inside = {key: found for key, field in section.model_fields.items() if (found := _section(field.annotation)) is not None}
    yield f"\n## {name}\n"
    yield from _table([_row(key, field) for key, field in section.model_fields.items()])
    for key, found in inside.items():
        yield from _tables(f"{name}.{key}", found)


def _table(rows: list[str]) -> list[str]:
    return ["| key | type | default | meaning |", "|---|---|---|---|", *rows]


def _row(name: str, field: FieldInfo) -> str:
    section = _section(field.annotation)
    kind = _kind(field.annotation)
    default = "see below" if section is not None and not field.is_required() and field.get_default(call_default_factory=True) else _default(field)
    cells = (f"`{name}`", kind, default, field.description or "")
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        return ", ".join(one.name for one in value)
    return f"`{json.dumps(value)}`"


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section a field holds, in a list or as one of several kinds too; None where it holds none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := _section(part)) is not None), None)


def _kind(annotation: Any) -> str:
    """A type as a reader of YAML knows it."""
    names = {str: "text", int: "number", float: "number", bool: "true/false", type(None): "null", Any: "any"}
    if annotation in names:
        return names[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(part) for part in parts))
    if origin in (tuple, list):
        return f"list of {_kind(parts[0])}"
    return "mapping" if origin is dict else str(annotation)


if __name__ == "__main__":
    print(markdown(), end="")
