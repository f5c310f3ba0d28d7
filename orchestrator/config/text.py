"""Text of a config: YAML in, `key=value` overrides, paths, and pydantic's complaints turned into sentences."""

from __future__ import annotations

import copy
import difflib
import os
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from orchestrator.config import catalogue, overrides, words, yaml_text
from orchestrator.errors import ConfigError, UnknownNameError, brief
from orchestrator.storage import addresses, paths

PRESETS = Path(__file__).parent / "presets"


def presets() -> dict[str, Path]:
    """Shipped experiments by name."""
    return {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}


def read(path: str | Path | None) -> tuple[dict[str, Any], Path]:
    """The raw mapping of a config file or preset name, and the folder its relative paths start from. Raises ConfigError."""
    known = presets()
    if path is None:
        path = known["pocket"]
    elif str(path) in known and not paths.is_file(path):
        path = known[str(path)]
    elif not paths.exists(path) and Path(path).suffix not in {".yaml", ".yml"} and os.sep not in str(path):
        raise UnknownNameError("preset", str(path), known)
    elif not paths.exists(path):
        raise ConfigError(f"config file {brief(path)} does not exist; give -c the path of a YAML file or a preset ({', '.join(known)})")
    path = paths.expanded(path)
    raw = yaml_text.parse(paths.read_text(path, "config file", most=yaml_text.MOST_BYTES), str(path))
    if not raw and (raw is None or isinstance(raw, dict)):
        raise ConfigError(f"{path} is empty, so it names no model, task or suite; fill it, or leave -c out for the pocket preset")
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, not a mapping of sections; see `safebasin config-schema`")
    folder = Path.cwd() if path.parent == PRESETS else path.resolve().parent
    return raw, folder


def is_preset(path: str | Path | None) -> bool:
    """Whether `read` takes this for a shipped experiment rather than a file of the user's."""
    return path is None or str(path) in presets() and not paths.is_file(path) or paths.expanded(path).parent == PRESETS


def lent(path: str | Path | None, raw: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Dotted keys, of two parts, that a preset gives and no override touches; [] for a file of the user's."""
    if not is_preset(path):
        return []
    given = [text.partition("=")[0].strip() for text in overrides]
    keys = [f"{section}.{name}" for section, block in raw.items() if isinstance(block, dict) for name in block]
    return [key for key in keys if not any(one == key or one.startswith(f"{key}.") or key.startswith(f"{one}.") for one in given)]


def override(raw: dict[str, Any], texts: Sequence[str], folder: Path, root: type[BaseModel]) -> None:
    """Apply `key=value` texts in place; a file of DeepSpeed's settings is read in first where one of its keys is set."""
    defaults = root().model_dump(mode="json") if texts else None
    for text in sorted(texts, key=lambda text: text.startswith("deepspeed.")):
        if text.startswith("deepspeed.") and isinstance(raw.get("deepspeed"), str):
            named = expand({"variables": raw.get("variables"), "deepspeed": raw["deepspeed"]})["deepspeed"]
            raw["deepspeed"] = _read_deepspeed(str(_absolute(named, folder)))
        overrides.apply(raw, text, root, defaults)


MOST_CHARACTERS = 1_000_000
"""Longest text that replacing variables may make."""
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def expand(raw: dict[str, Any]) -> dict[str, Any]:
    """`${name}` in every text, from the file's `variables`, else from the environment; a variable may use the environment and others
    defined above it. Raises ConfigError naming a variable that is neither."""
    given = raw.get("variables")
    if given is not None and not isinstance(given, dict):
        raise ConfigError(f"variables is a mapping of names to texts, not {type(given).__name__}")
    known: dict[str, str] = {}
    for name, value in (given or {}).items():
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ConfigError(f"variables.{name}={value!r} is no text; put it in quotes, as it is to stand where ${{{name}}} stands")

    def fill(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {k: fill(v, f"{key}.{k}" if key else str(k)) for k, v in value.items()}
        if isinstance(value, list):
            return [fill(v, f"{key}.{i}") for i, v in enumerate(value)]
        return replaced(value, key) if isinstance(value, str) else value

    def replaced(value: str, key: str) -> str:
        made = _VARIABLE.sub(lambda match: text(match.group(1), key), value)
        if len(made) > MOST_CHARACTERS >= len(value):
            many = f"{len(made):,} characters once its variables are replaced"
            raise ConfigError(f"{key} has {many}, at most {MOST_CHARACTERS:,} are taken; write less")
        return made

    def text(name: str, key: str) -> str:
        found = known.get(name, os.environ.get(name))
        if found is None and name in (given or {}):
            raise ConfigError(
                f"{key} uses ${{{name}}}, which is {'itself' if key == f'variables.{name}' else 'defined below it'}; a variable may use those "
                "above it and the environment, so write out what it stands for, or change the order"
            )
        if found is None:
            raise ConfigError(
                f"{key} uses ${{{name}}}, which is neither in `variables` nor an environment variable; "
                f"set {key}=..., variables.{name}=..., or export {name}"
            )
        return found

    for name, value in (given or {}).items():
        known[str(name)] = str(fill(value, f"variables.{name}"))
    rest = fill({k: v for k, v in raw.items() if k != "variables"}, "")
    return {**rest, "variables": known} if known else rest


def files_of(text: Any, folder: Path) -> list[Path]:
    """The files that a config's path, or the path of DeepSpeed's settings in it, may stand for; none for a preset, or settings inline."""
    if not isinstance(text, (str, Path)) or "\n" in str(text) or "\0" in str(text):
        return []
    path = Path(os.path.expanduser(text))
    return [Path(os.path.abspath(p)) for p in (folder / path, path) if os.path.isfile(p)]


def resolve_paths(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Relative data, model, template and DeepSpeed paths that exist below `folder` become absolute; DeepSpeed's file is read in."""
    raw = copy.deepcopy(raw)

    def absolute(text: Any) -> Any:
        return _absolute(text, folder)

    named = {
        "model": ("model_name_or_path", "unaligned_name_or_path", "chat_template"),
        "task": ("data", "eval_data"),
        "safety": ("data", "harmful_data"),
    }
    for section, keys in named.items():
        block = raw.get(section)
        if isinstance(block, dict):
            block.update({key: absolute(block[key]) for key in keys if key in block})
    suites = (raw.get("safety") or {}).get("suites") if isinstance(raw.get("safety"), dict) else None
    for suite in suites if isinstance(suites, list) else []:
        if isinstance(suite, dict) and "data" in suite:
            suite["data"] = absolute(suite["data"])
            known = catalogue.entry(suite["data"]) if isinstance(suite["data"], str) else None
            local = absolute(suite.get("local"))
            if known is not None and not local:
                local = catalogue.find_local(known, catalogue.folders(folder, Path.cwd()))
            if local:
                suite["local"] = str(local)
    if isinstance(raw.get("deepspeed"), str):
        raw["deepspeed"] = _read_deepspeed(absolute(raw["deepspeed"]))
    return raw


def _absolute(text: Any, folder: Path) -> Any:
    """The absolute path of what a text names in `folder` or here; the text itself where there is nothing of that name."""
    if not isinstance(text, str) or not text or text == "pocket" or text.startswith("pocket:"):
        return text
    path = paths.expanded(text)
    return next((str(candidate.resolve()) for candidate in (folder / path, path) if paths.exists(candidate)), text)


def _read_deepspeed(path: str) -> dict[str, Any]:
    if not path.strip():
        raise ConfigError("deepspeed: the text is empty; give DeepSpeed's settings inline, the path of its JSON file, or leave the key out")
    if not paths.exists(path):
        raise ConfigError(f"deepspeed: file {brief(path)} does not exist; give DeepSpeed's settings inline or the path of its JSON file")
    body = yaml_text.parse(paths.read_text(path, "deepspeed: file", most=yaml_text.MOST_BYTES), f"deepspeed file {path}")
    if not isinstance(body, dict):
        raise ConfigError(f"deepspeed: {path} holds no mapping; DeepSpeed's configuration is a JSON object")
    return body


def build(cls: type[BaseModel], raw: dict[str, Any]) -> Any:
    """Validate `raw` as `cls`; pydantic's errors become one ConfigError with one line per mistake."""
    raw = yaml_text.plain(raw, "the config")
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        details = error.errors()
        lines = [_sentence(cls, detail) for detail in words.merged(details, [_key(detail["loc"]) for detail in details])]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _loc(parts: Sequence[Any]) -> list[Any]:
    """Where an error is, without pydantic's names of the kinds it tried."""
    kinds = ("tuple[", "dict[", "str", "function-", "literal[", "Escalation", "list[")
    return [part for i, part in enumerate(parts) if not (isinstance(part, str) and part.startswith(kinds) and (i > 0))]


def _key(parts: Sequence[Any]) -> str:
    return ".".join(str(part) for part in _loc(parts))


def _sentence(cls: type[BaseModel], detail: dict[str, Any]) -> str:
    loc = _loc(detail["loc"])
    key = _key(detail["loc"])
    if detail["type"] == "extra_forbidden":
        known = sorted(_fields_at(cls, loc[:-1]))
        close = difflib.get_close_matches(str(loc[-1]), known, n=3, cutoff=0.5)
        elsewhere = [name for name in _dotted(cls) if name.rsplit(".", 1)[-1] == str(loc[-1])]
        hint = f"did you mean {' or '.join(close)}?" if close else f"did you mean {elsewhere[0]}?" if elsewhere else f"known here: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    message = words.sentence(detail, key)
    value = detail.get("input")
    if detail["type"] == "missing":
        return f"{key} is required"
    value = addresses.masked(value) if isinstance(value, str) and addresses.is_address(value) else value
    shown = "" if isinstance(value, (dict, list, tuple)) else f" (got {brief(value)})"
    if not key or message.startswith((f"{key}:", f"{key}=", f"{key} ")):  # it says key and value itself
        return message
    return f"{key}: {message}{shown}"


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (tuple, list, dict, typing.Union, types.UnionType):
        for inner in typing.get_args(annotation):
            found = _model_of(inner)
            if found:
                return found
    return None


def _fields_at(cls: type[BaseModel], loc: list) -> list[str]:
    for part in loc:
        if isinstance(part, int):
            continue
        field = cls.model_fields.get(part)
        cls = (_model_of(field.annotation) if field else None) or cls
    return list(cls.model_fields)


def _dotted(cls: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in cls.model_fields.items():
        names.append(prefix + name)
        inner = _model_of(field.annotation)
        if inner:
            names += _dotted(inner, f"{prefix}{name}.")
    return names
