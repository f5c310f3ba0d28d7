"""Experiment: one frozen, validated description of a run. YAML + `key=value` overrides in, JSON schema out.

`load(path, overrides)` is the only door: it reads YAML (with `3e-4` as a number), applies overrides, refuses unknown keys with the
nearest names and resolves relative paths against the file's folder. What needs more than the text itself (strategies, ZeRO stages,
files) is checked by `orchestrator.experiment.checks`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, field_validator, model_validator

from orchestrator import redaction
from orchestrator.config import deepspeed_keys
from orchestrator.config.safety import Anchors, External, Generation, Limits, Safety, Sequential, Suite
from orchestrator.config.section import Section
from orchestrator.config.sections import (
    Columns,
    Escalation,
    Model,
    Monitor,
    Output,
    Quick,
    Ray,
    RecipeItem,
    Search,
    Task,
    Tracking,
    Training,
    recipe_items,
)  # fmt: skip
from orchestrator.errors import ConfigError
from orchestrator.storage import addresses, cache

__all__ = [
    "Anchors", "Columns", "Escalation", "Experiment", "External", "Generation", "Limits", "Model", "Monitor", "Output", "Quick", "Ray", "RecipeItem", "Safety",
    "Search", "Section", "Sequential", "Suite", "Task", "Tracking", "Training", "amended", "dump_yaml", "from_dict", "json_schema", "load", "recipe_items",
]  # fmt: skip


MOST_RECIPES, MOST_SUITES, MOST_VARIABLES = 1000, 200, 1000
"""More than anybody needs, and few enough to be checked in seconds."""


class _Origin(tuple):
    """Files a config was read from, keys a preset brought. No part of what it says: all are equal."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Origin)

    def __hash__(self) -> int:
        return 0


class Experiment(Section):
    """Everything that decides what a run does."""

    _origin: _Origin = PrivateAttr(default_factory=_Origin)
    _lent: _Origin = PrivateAttr(default_factory=_Origin)

    variables: dict[str, str] = Field(
        default_factory=dict,
        description="Names usable as `${name}` in any text of this file, e.g. {data: /path}; set with `variables.data=/path`. Environment variables fill the rest.",
    )
    name: str = Field("pocket", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, description="Name of the experiment.")
    model: Model = Field(default_factory=Model)
    task: Task = Field(default_factory=Task)
    safety: Safety = Field(default_factory=Safety)
    recipes: tuple[tuple[RecipeItem, ...], ...] = Field(
        (("full",), ("lora",), ("freeze_layers", "lora"), ("safe_instruct",), ("safegrad",)),
        min_length=1,
        description="Lists of strategies that run together; an item is a name or {name: {knob: value}} with pinned knobs.",
    )
    search: Search = Field(default_factory=Search)
    training: Training = Field(default_factory=Training)
    deepspeed: dict[str, Any] = Field(
        default_factory=lambda: {"zero_optimization": {"stage": 0}},
        description="DeepSpeed's own configuration, inline or the path of its JSON file. Batch sizes, optimiser and clipping come from `training`.",
    )
    monitor: Monitor = Field(default_factory=Monitor)
    ray: Ray = Field(default_factory=Ray)
    tracking: Tracking = Field(default_factory=Tracking)
    output: Output = Field(default_factory=Output)

    @field_validator("variables")
    @classmethod
    def _some_variables(cls, value):
        if len(value) > MOST_VARIABLES:
            raise ValueError(f"{len(value):,} variables, at most {MOST_VARIABLES:,} are taken; name fewer")
        return value

    @field_validator("recipes", mode="before")
    @classmethod
    def _some_recipes(cls, value):
        if isinstance(value, list | tuple) and len(value) > MOST_RECIPES:
            raise ValueError(f"{len(value):,} recipes, at most {MOST_RECIPES:,} are taken; name fewer")
        return value

    @field_validator("recipes")
    @classmethod
    def _not_empty(cls, value):
        written = [json.dumps([recipe_items((item,)) if not isinstance(item, dict) or len(item) == 1 else item for item in recipe], sort_keys=True)
                   for recipe in value]  # fmt: skip
        twice = next((k for k, text in enumerate(written) if text in written[:k]), None)
        if twice is not None and value[twice]:
            first = written.index(written[twice])
            raise ValueError(f"the recipes {first + 1} and {twice + 1} are the same, {list(value[twice])}; keep one, trials are shared between recipes")
        for recipe in value:
            if not recipe:
                raise ValueError("a recipe is empty; for plain fine-tuning write [full]")
            for item in recipe:
                if isinstance(item, dict) and len(item) != 1:
                    raise ValueError(f"a recipe item is a name or {{name: {{knob: value}}}} with one name, not {item}")
        return value

    @model_validator(mode="after")
    def _unique_suites(self):
        names = [s.name for s in self.safety.suites]
        if len(names) > MOST_SUITES:
            raise ValueError(f"safety.suites holds {len(names):,} suites (lists of attacks and sets written out), at most {MOST_SUITES} are taken")
        if len({name.casefold() for name in names}) != len(names):
            raise ValueError(f"safety.suites {names} repeats a name (capitals aside, as file systems do); give each suite its own")
        return self

    @model_validator(mode="after")
    def _screenings_are_confirmed(self):
        if self.safety.sequential.enabled and not self.search.finalists:
            raise ValueError("safety.sequential stops evaluations early and only finalists are asked in full, so search.finalists must be at least 1")
        return self

    @model_validator(mode="after")
    def _deepspeed_has_its_form(self):
        try:
            deepspeed_keys.check_form(self.deepspeed)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _no_secrets(self):
        """Every file of a run holds its config, and Ray writes what it is told into logs and command lines."""
        found = redaction.find_secret(self.model_dump(mode="json"))
        if found is None:
            return self
        key, shown = found
        where = {
            "tracking": "leave it out here and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI,",
            "ray": "leave it out here and set it",
        }.get(key.split(".")[0], "name the variable that holds it where that is possible, and set it")
        raise ValueError(
            f"{key} ({shown}) holds a secret, which would lie in files, logs and process lists of the run; {where} in the environment of safebasin "
            "and of the cluster's nodes"
        )

    @classmethod
    def load(cls, config: str | Path | Mapping[str, Any] | Experiment | None = None, *overrides: str) -> Experiment:
        """An experiment with `key=value` overrides on top: of a YAML file's path, a preset's name, sections as a mapping (paths in it are relative to
        the current folder), another experiment, or None for the pocket preset. Raises ConfigError with the key, the value and the remedy."""
        if isinstance(config, Experiment):
            return amended(config, overrides) if overrides else config
        return _of_mapping(config, overrides) if isinstance(config, Mapping) else load(config, overrides)

    @property
    def origin(self) -> tuple[Path, ...]:
        """The files it was read from (config, DeepSpeed's), absolute; none where it was made otherwise."""
        return tuple(self._origin)

    def with_origin(self, paths: Iterable[Path]) -> Experiment:
        """The same experiment, said to be read from these files."""
        found = self.model_copy()
        found._origin = _Origin(paths)
        return found

    @property
    def confirms(self) -> bool:
        """Whether finalists are trained again on further seeds, so that what is held out of the search is asked of somebody."""
        return bool(self.search.finalists) and len(self.search.seeds) > 1

    @property
    def lent(self) -> frozenset[str]:
        """Dotted keys of data whose value a preset brought, and that the user did not write."""
        return frozenset(self._lent)

    def with_lent(self, keys: Iterable[str]) -> Experiment:
        """The same experiment, these keys said to be a preset's."""
        found = self.model_copy()
        found._lent = _Origin(sorted(keys))
        return found

    @property
    def zero_stage(self) -> int:
        return int((self.deepspeed.get("zero_optimization") or {}).get("stage", 0))

    @property
    def recipe_names(self) -> tuple[str, ...]:
        """Readable, unique keys of the recipes: `freeze_layers+lora`, a second one of the same strategies `...#2`."""
        seen: dict[str, int] = {}
        names = []
        for recipe in self.recipes:
            name = "+".join(strategy for strategy, _ in recipe_items(recipe))
            seen[name] = seen.get(name, 0) + 1
            names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
        return tuple(names)

    @property
    def output_address(self) -> str | None:
        """The address `output.dir` is; None where it is a folder."""
        found = self.output.dir.replace("{name}", self.name)
        return found if addresses.is_address(found) else None

    @property
    def output_dir(self) -> Path:
        """The folder `output.dir`; for an address the folder on this machine that holds its copy."""
        address = self.output_address
        return Path(self.output.dir.replace("{name}", self.name)) if address is None else cache.staging(address)

    @property
    def output_place(self) -> str:
        """`output.dir` as it is shown."""
        address = self.output_address
        return str(self.output_dir.absolute()) if address is None else addresses.masked(address)

    def place_of(self, *names: str) -> str:
        """A file below `output.dir` as it is shown."""
        address = self.output_address
        return str(self.output_dir.absolute().joinpath(*names)) if address is None else addresses.joined(self.output_place, *names)

    def digest(self) -> str:
        """Hash of what decides the results, the number of workers (rows per step) among it: not of where they are made and go."""
        body = self.model_dump(mode="json", exclude={"ray", "tracking", "output", "name", "variables"})
        return _hash(body | {"num_workers": self.ray.num_workers})

    def digest_of(self, *sections: str) -> str:
        """Hash of some sections, for what is cached between trials and runs."""
        return _hash(self.model_dump(mode="json", include=set(sections)))


def _hash(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def json_schema() -> dict[str, Any]:
    """JSON schema of the config file, for editors and `safebasin config-schema`."""
    return Experiment.model_json_schema()


def dump_yaml(experiment: Experiment) -> str:
    """The resolved config as YAML that `load` reads back to an equal Experiment."""
    import yaml

    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Experiment:
    """Read a config file (the pocket preset without one), apply `key=value` overrides, validate.

    Raises ConfigError (exit code 2) with the key, the value and the remedy.
    """
    from orchestrator.config import text as config_text

    raw, folder = config_text.read(path)
    lent = config_text.lent(path, raw, overrides)
    named = raw.get("deepspeed")  # an override of a key in it reads it in
    config_text.override(raw, overrides, folder, Experiment)
    raw = config_text.expand(raw)
    origin = [file for text in (path, named, raw.get("deepspeed")) for file in config_text.files_of(text, folder)]
    return config_text.build(Experiment, config_text.resolve_paths(raw, folder)).with_origin(origin).with_lent(lent)


def amended(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """The experiment with `key=value` overrides on top; the files it was read from stay said. Raises ConfigError."""
    made = _of_mapping(experiment.model_dump(mode="json"), overrides)
    given = [text.partition("=")[0].strip() for text in overrides]
    return made.with_origin(experiment.origin).with_lent(key for key in experiment.lent if key not in given)


def _of_mapping(sections: Mapping[str, Any], overrides: Sequence[str]) -> Experiment:
    from orchestrator.config import text as config_text

    raw = copy.deepcopy(dict(sections))
    config_text.override(raw, overrides, Path.cwd(), Experiment)
    return config_text.build(Experiment, config_text.resolve_paths(config_text.expand(raw), Path.cwd()))


def from_dict(raw: dict[str, Any]) -> Experiment:
    """Validate a plain dict (as from `model_dump`); raises ConfigError."""
    from orchestrator.config import text as config_text

    if not isinstance(raw, dict):
        raise ConfigError(f"a config is a mapping of sections, not {type(raw).__name__}")
    return config_text.build(Experiment, raw)
