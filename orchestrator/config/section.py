"""What every section of a config file is made of: the base model, patterns of names, bounds of numbers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from orchestrator.config import field_kinds

NAME = r"^[^./\\\s\x00-\x1f\x7f-\x9f]([^/\\\x00-\x1f\x7f-\x9f\x{2028}\x{2029}]*[^/\\\s\x00-\x1f\x7f-\x9f])?$"
"""Names that become parts of metric names and of files: no slash, no control character, no dot in front, no space at an end."""


COUNT = 10**9
"""Bound of whatever is counted in steps, rows or prompts."""
TOKENS = 10**7
SECONDS = 10**8
"""Three years."""


class Section(BaseModel):
    """A block of the config: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        """`yes` is no number, 2024 no text and 1 no truth value; an empty text is none where one is wanted."""
        field = cls.model_fields[info.field_name]
        return field_kinds.checked(field.annotation, value, empty=info.field_name == "system_prompt")
