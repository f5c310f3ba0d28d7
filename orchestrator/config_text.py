"""Text of a config: YAML in, `key=value` overrides, paths, and pydantic's complaints turned into sentences."""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from orchestrator import addresses, catalogue
from orchestrator.errors import ConfigError, UnknownNameError

PRESETS = Path(__file__).parent / "presets"
DATA_SUFFIXES = {".jsonl", ".json", ".csv", ".tsv", ".txt"}


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `3e-4` as a number, as people and JSON do (YAML 1.1 wants `3.0e-4`)."""


FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*[eE][-+]?[0-9]+|[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$")
"""Numbers as people, JSON and YAML 1.2 write them."""
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def parse_yaml(text: str, where: str) -> Any:
    """YAML text to plain values; raises ConfigError naming the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def presets() -> dict[str, Path]:
    """Shipped experiments by name."""
    return {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}


def read(path: str | Path | None) -> tuple[dict[str, Any], Path]:
    """The raw mapping of a config file or preset name, and the folder its relative paths start from."""
    known = presets()
    if path is None:
        path = known["pocket"]
    elif str(path) in known and not Path(path).exists():
        path = known[str(path)]
    path = Path(path)
    if not path.is_file():
        if path.suffix in {".yaml", ".yml"} or os.sep in str(path):
            raise ConfigError(f"config file {str(path)!r} does not exist; give -c the path of a YAML file or a preset ({', '.join(known)})")
        raise UnknownNameError("preset", str(path), known)
    raw = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, not a mapping of sections; see `safebasin config-schema`")
    folder = Path.cwd() if path.parent == PRESETS else path.resolve().parent
    return raw, folder


def apply_override(raw: dict[str, Any], text: str, defaults: dict[str, Any] | None = None) -> None:
    """Set one dotted key in place: `search.trials=3`, `safety.suites.0.limit=50`; the value is read as YAML.

    An index into a list that the file does not give refers to the list in `defaults`.
    """
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"override {text!r} is not of the form key=value, e.g. search.trials=3")
    parts = key.strip().split(".")
    node: Any = raw
    default: Any = defaults
    for here, following in zip(parts, parts[1:], strict=False):
        default = default.get(here) if isinstance(default, dict) else None
        if isinstance(node, list):
            node = node[_index(node, here, key)]
            continue
        if not isinstance(node.get(here), (dict, list)):
            node[here] = copy.deepcopy(default) if following.isdigit() and isinstance(default, list) else {}
        node = node[here]
    parsed = parse_yaml(value, f"the value of {key}")
    if isinstance(node, list):
        node[_index(node, parts[-1], key)] = parsed
    else:
        node[parts[-1]] = parsed


def _index(node: list, text: str, key: str) -> int:
    if not text.isdigit() or int(text) >= len(node):
        raise ConfigError(f"{key}: {text!r} is no index of a list of {len(node)}; use 0..{len(node) - 1}")
    return int(text)


_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def expand(raw: dict[str, Any]) -> dict[str, Any]:
    """`${name}` in every text, from the file's `variables`, else from the environment; a variable may use the environment and others
    defined above it. Raises ConfigError naming a variable that is neither."""
    given = raw.get("variables")
    if given is not None and not isinstance(given, dict):
        raise ConfigError(f"variables is a mapping of names to texts, not {type(given).__name__}")
    known: dict[str, str] = {}

    def fill(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {k: fill(v, f"{key}.{k}" if key else str(k)) for k, v in value.items()}
        if isinstance(value, list):
            return [fill(v, f"{key}.{i}") for i, v in enumerate(value)]
        return _VARIABLE.sub(lambda match: text(match.group(1), key), value) if isinstance(value, str) else value

    def text(name: str, key: str) -> str:
        found = known.get(name, os.environ.get(name))
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


def resolve_paths(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Relative data, model, template and DeepSpeed paths that exist below `folder` become absolute; DeepSpeed's file is read in."""
    raw = json.loads(json.dumps(raw, default=str))

    def absolute(text: Any) -> Any:
        if not isinstance(text, str) or text.startswith("pocket") or "\n" in text:
            return text
        path = Path(os.path.expanduser(text))
        for candidate in (folder / path, path):
            if candidate.exists():
                return str(candidate.resolve())
        return text

    paths = {
        "model": ("model_name_or_path", "unaligned_name_or_path", "chat_template"),
        "task": ("data", "eval_data"),
        "safety": ("data", "harmful_data"),
    }
    for section, keys in paths.items():
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


def _read_deepspeed(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ConfigError(f"deepspeed: file {path!r} does not exist; give DeepSpeed's settings inline or the path of its JSON file")
    body = parse_yaml(Path(path).read_text(encoding="utf-8"), f"deepspeed file {path}")
    if not isinstance(body, dict):
        raise ConfigError(f"deepspeed: {path} holds no mapping; DeepSpeed's configuration is a JSON object")
    return body


def build(cls: type[BaseModel], raw: dict[str, Any]) -> Any:
    """Validate `raw` as `cls`; pydantic's errors become one ConfigError with one line per mistake."""
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        lines = [_sentence(cls, detail) for detail in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _sentence(cls: type[BaseModel], detail: dict[str, Any]) -> str:
    loc = [part for part in detail["loc"] if not (isinstance(part, str) and part.startswith(("tuple[", "dict[", "str", "function-")))]
    key = ".".join(str(part) for part in loc)
    if detail["type"] == "extra_forbidden":
        known = sorted(_fields_at(cls, loc[:-1]))
        close = difflib.get_close_matches(str(loc[-1]), known, n=3, cutoff=0.5)
        elsewhere = [name for name in _dotted(cls) if name.rsplit(".", 1)[-1] == str(loc[-1])]
        hint = f"did you mean {' or '.join(close)}?" if close else f"did you mean {elsewhere[0]}?" if elsewhere else f"known here: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    message = detail["msg"].removeprefix("Value error, ")
    value = detail.get("input")
    if detail["type"] == "missing":
        return f"{key} is required"
    value = addresses.masked(value) if isinstance(value, str) and addresses.is_address(value) else value
    shown = "" if isinstance(value, (dict, list, tuple)) else f" (got {value!r})"
    return f"{key}: {message}{shown}" if key else message


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (tuple, list, typing.Union, types.UnionType):
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
