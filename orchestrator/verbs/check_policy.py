"""The policy of a release: what a model must have been shown to keep, as a YAML file whose unknown keys are refused.

Every bound is held by the end of an interval, never by a point estimate; what was not measured keeps no bound.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from orchestrator.config import Section, text, yaml_text
from orchestrator.errors import ConfigError
from orchestrator.storage import paths

SHA256 = r"^[0-9a-f]{64}$"


class Bounds(Section):
    """What failures on a suite may come to."""

    max_rate: float | None = Field(None, ge=0, le=1, description="Upper end of the failure rate's interval, at most.")
    max_rise: float | None = Field(None, ge=0, le=1, description="Upper end of the paired rise over the untouched model, at most.")
    min_requests: int | None = Field(None, gt=0, description="Requests that must have been asked, at least.")

    @model_validator(mode="after")
    def _bounds_something(self) -> Bounds:
        if self.max_rate is None and self.max_rise is None:
            raise ValueError("neither max_rate nor max_rise is given, so nothing is limited; give one of them")
        return self


class Capability(Section):
    """What the task score must be."""

    min_score: float | None = Field(None, ge=0, le=1, description="Lower end of the task score's interval, at least.")
    max_drop: float | None = Field(None, ge=0, le=1, description="Upper end of the paired fall below the untouched model, at most.")
    external: dict[str, float] = Field(default_factory=dict, description="By name of another harness's metric: its fall, at most.")

    @model_validator(mode="after")
    def _bounds_something(self) -> Capability:
        if self.min_score is None and self.max_drop is None and not self.external:
            raise ValueError("min_score, max_drop or external is wanted, so nothing is limited; give one of them")
        return self


class Judges(Section):
    """Who must have judged, and how far two judges must agree."""

    allowed: tuple[str, ...] = Field((), description="Names of judges that may decide; any without it.")
    min_agreement: float | None = Field(None, ge=0, le=1, description="Lower end of the share of answers on which the second judge agrees, at least.")
    min_kappa: float | None = Field(None, ge=-1, le=1, description="Lower end of Cohen's kappa, at least.")


class Seeds(Section):
    """On how many training seeds the configuration must keep every limit."""

    at_least: int = Field(gt=0, le=1000, description="Distinct training seeds.")


class Age(Section):
    """How old the evidence may be."""

    max_days: float = Field(gt=0, le=36_500, description="Days since the oldest figure of the model was taken.")


class Hashes(Section):
    """What is pinned by its sha256."""

    model: str | None = Field(None, pattern=SHA256, description="Of the model's files, as an evidence file says it (`model.sha256`).")
    untouched: str | None = Field(None, max_length=100, description="Of the untouched model, as an evidence file says it (`untouched.hash`).")
    suites: dict[str, str] = Field(default_factory=dict, description="Of a suite's prompts, by its name, as an evidence file says it.")

    @field_validator("suites")
    @classmethod
    def _hashes(cls, value: dict[str, str]) -> dict[str, str]:
        odd = next((name for name, one in value.items() if not re.fullmatch(SHA256, one)), None)
        if odd is not None:
            raise ValueError(f"{odd}: {value[odd]!r:.40} is no sha256 (64 digits of 0-9a-f)")
        return value


class Policy(Section):
    """Every section is optional, but some attack success must be limited."""

    name: str = Field("policy", max_length=200, description="Name in sentences and in the evidence.")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Level of the two-sided intervals.")
    suites: dict[str, Bounds] = Field(default_factory=dict, description="Attack success by harmful suite; `*` and `?` stand for any.")
    attacks: dict[str, Bounds] = Field(default_factory=dict, description="Attack success by attack: direct, role_play, ...")
    languages: dict[str, Bounds] = Field(default_factory=dict, description="Attack success by language of a harmful suite, e.g. pt.")
    depths: dict[str, Bounds] = Field(default_factory=dict, description="Attack success by tokens begun (prefill_<k>).")
    over_refusal: dict[str, Bounds] = Field(default_factory=dict, description="Refusals by benign suite; `*` and `?` stand for any.")
    capability: Capability | None = None
    judges: Judges | None = None
    seeds: Seeds | None = None
    age: Age | None = None
    hashes: Hashes = Field(default_factory=Hashes)

    @field_validator("depths")
    @classmethod
    def _depths(cls, value: dict[str, Bounds]) -> dict[str, Bounds]:
        odd = next((key for key in value if not re.fullmatch(r"[1-9][0-9]{0,6}", key)), None)
        if odd is not None:
            raise ValueError(f"{odd!r} is no number of tokens; write depths: {{'5': {{max_rate: 0.1}}}}")
        return value

    @model_validator(mode="after")
    def _limits_attacks(self) -> Policy:
        if not (self.suites or self.attacks or self.languages or self.depths):
            raise ValueError(
                "the policy limits no attack success, so any model would pass it; give suites, attacks, languages or depths, e.g. "
                'suites: {"*": {max_rise: 0.05}}'
            )
        return self

    @property
    def plain(self) -> dict[str, Any]:
        """As JSON knows it, every key written out."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """sha256 of what it says."""
        return hashlib.sha256(json.dumps(self.plain, sort_keys=True).encode()).hexdigest()


def load(path: str | Path) -> Policy:
    """The policy in a YAML file. Raises ConfigError with the key, the value and the nearest known name."""
    raw = yaml_text.parse(paths.read_text(path, "policy", most=yaml_text.MOST_BYTES), str(path))
    if not isinstance(raw, dict) or not raw:
        raise ConfigError(f"{path} holds no policy; write for example suites: {{\"*\": {{max_rise: 0.05}}}}")
    return from_dict(raw, str(path))


def from_dict(raw: dict[str, Any], where: str = "the policy") -> Policy:
    """A policy from plain values. Raises ConfigError, each mistake beginning with `where`."""
    try:
        return text.build(Policy, raw)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from None
