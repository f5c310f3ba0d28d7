"""The exception tree. Messages name the rule, the value and the remedy, in one sentence or two.

SafebasinError                 exit 1
├── ConfigError                exit 2   what the user wrote cannot work; found before a device is taken
│   ├── UnknownNameError                a name that is not registered, with the nearest matches
│   ├── DataError                       a file or data set that is missing, empty or has the wrong columns
│   ├── ModelError                      a model that cannot be loaded or used (no chat template, no such layer)
│   └── CapacityError                   a request that does not fit the cluster
├── TrialError                 exit 1   one trial failed; the search goes on
│   ├── NonFiniteLossError              the loss or a gradient became NaN or infinite
│   │   └── NonFiniteLogitsError         a model's outputs became NaN or infinite while it was asked
│   └── JudgeError                      a judge that cannot be reached, or that decides too few answers
├── LaneError                  exit 1   a worker group died more often than allowed
├── TrackingError              exit 1   MLflow refused what we sent
└── StorageError               exit 1   the output folder cannot be written (disk full, permissions)

"Nothing feasible" is no error but an outcome: `experiment.run` returns it, the CLI exits with 3.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def brief(value: object, most: int = 200) -> str:
    """A value in a sentence: its repr, or the beginning of it where it is long."""
    text = repr(str(value) if not isinstance(value, (int, float, bool, str, bytes, type(None), list, tuple, dict)) else value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


class SafebasinError(Exception):
    """Base of all errors that a user is meant to read."""

    exit_code = 1


class ConfigError(SafebasinError):
    """What the user wrote cannot work."""

    exit_code = 2


class UnknownNameError(ConfigError):
    """A name that is not registered."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known = sorted(known)
        close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(repr(c) for c in close)}?" if close else f"known: {', '.join(known)}"
        super().__init__(f"unknown {kind} {brief(name)}; {hint}")
        self.kind, self.name, self.matches = kind, name, close


class DataError(ConfigError):
    """A file or data set that is missing, empty or has the wrong columns. Names out of files stand in its sentence, so that is kept to
    one line of characters that a terminal only shows, and to LONGEST of them."""

    def __init__(self, sentence: str):
        from orchestrator import texts

        super().__init__(sentence if sentence.isprintable() and len(sentence) <= LONGEST else texts.one_line(sentence, LONGEST))


LONGEST = 1500


class ModelError(ConfigError):
    """A model that cannot be loaded or used."""


class CapacityError(ConfigError):
    """A request that does not fit the cluster."""


class TrialError(SafebasinError):
    """One trial failed; the search goes on."""


class NonFiniteLossError(TrialError):
    """The loss or a gradient became NaN or infinite."""


class NonFiniteLogitsError(NonFiniteLossError):
    """A model's outputs became NaN or infinite while it was asked."""


class JudgeError(TrialError):
    """A judge that cannot be reached, or that decides too few answers."""


class LaneError(SafebasinError):
    """A worker group died more often than allowed."""


class TrackingError(SafebasinError):
    """MLflow refused what we sent."""


class StorageError(SafebasinError):
    """The output folder cannot be written."""
