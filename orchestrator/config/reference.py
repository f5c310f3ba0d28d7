"""Every key of the config file as a Markdown page, from the fields' own descriptions: `python -m orchestrator.config.reference`."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from orchestrator.config.experiment import Experiment

HEAD = """# Every key of a config file

Made from the code by `python -m orchestrator.config.reference`. `safebasin config-schema` prints the same as JSON schema for an editor;
`safebasin validate -c FILE` checks a file. Any key can be given on the command line by its dotted name, e.g.
`safebasin run -c job.yaml search.trials=60 safety.limits.max_degradation=0.03`. Unknown keys are
refused, with the nearest ones named. Knobs of strategies stand in [Strategies](strategies.md); `${name}` stands for a variable of
the file or the environment.

## How it is read

A file is YAML (UTF-8, at most 300 kB) in which nothing is read as something else than it looks like: a key that stands twice, a number with a
leading zero, `yes` where a number is wanted, `2024` or `no` where a text is (put it in quotes), `.inf` and `.nan` are refused, and so are tags and
keys that are no texts. `3e-4` is a number; dates and `1:30` are texts. Bounds of numbers catch slips of the pen; seeds are 0 to 2147483647.

On the command line a value whose type is `text`, or one of several words, is taken letter by letter: in
`'model.system_prompt=Ticket #1: yes'` nothing needs quotes beside the shell's. `null`, or nothing after the `=`, is null where the type says
`or null`. Every other value is YAML, without comments: `'safety.judge={name: refusal, list: xstest}'`, `search.trials=3`; a text inside such a
value, or below `deepspeed`, `search.space` or a judge's options, wants quotes of its own where it holds signs of YAML.

Paths start from the file's folder or from here; `~` is the home folder, in `output.dir` too. A text that names nothing there is taken for what else
the key allows (a hub id, a data set, a template). `deepspeed` may be a file of Hugging Face's: `auto` then means what `training` says, or, for
sizes of buffers, DeepSpeed's default; any other `auto`, and a scheduler, are refused by name. A chat template is tried in a small process first, with
5 s and 1 GiB: one that is broken, has no end or leaves out what was said is refused.
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
