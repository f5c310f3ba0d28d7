"""What may be said anew when a run is resumed: budgets, machines, tracking and what is kept; nothing that finished trials were measured by."""

from __future__ import annotations

import re
from collections.abc import Sequence

from orchestrator import config
from orchestrator.config import Experiment
from orchestrator.config import overrides as settings
from orchestrator.errors import ConfigError, brief
from orchestrator.experiment import identity

NOT_AGAIN = ("variables", "name", "output", "search.storage", "search.finalists")
"""Free for a config that is edited, and yet nothing to say on resuming: the run's name and places, and `search.finalists`, which decides at
what level confirmed trials were held against what the search never asked (`held_out.looks`)."""
ALLOWED = (*(key for key in identity.FREE if key not in NOT_AGAIN), "output.keep_models")
"""Keys, and what is below them, that a resumed run takes as overrides."""
MORE = re.compile(r"\s*search\.trials\s*=\s*\+\s*(\d{1,9})\s*")
"""So many trials more than the run was to make."""


def amended(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """The experiment of a run with `key=value` overrides, for going on with it; `search.trials=+20` is 20 more than its budget.

    Raises ConfigError for a key that decides what finished trials mean, with the keys that may change, and for what no override is.
    """
    if not overrides:
        return experiment
    for text in overrides:
        key = text.partition("=")[0].strip()
        if "=" in text and not any(key == one or key.startswith(f"{one}.") for one in ALLOWED):  # what is no key=value is told by who reads it
            settings.annotation_at(Experiment, key.split("."))  # a misspelt one is told as such
            raise _refused(text, key)
    added = [MORE.fullmatch(text) for text in overrides]
    total = experiment.search.trials + sum(int(match[1]) for match in added if match)
    kept = [text for text, match in zip(overrides, added, strict=True) if match is None]
    made = config.amended(experiment, [*kept, f"search.trials={total}"] if any(added) else kept)
    bound, _ = identity.changes(experiment, made)
    if bound:  # part of a section that was given as a whole, or free only in part
        raise _refused("; ".join(overrides), bound[0].partition(":")[0])
    return made


def _refused(text: str, key: str) -> ConfigError:
    names = ", ".join(f"{one}.*" if one in Experiment.model_fields else one for one in ALLOWED)
    return ConfigError(
        f"override {brief(text)}: a resumed run takes no other {key}, because its finished trials were measured by the one it has, or lie where it "
        f"says; these may change: {names} (not {', '.join(identity.BOUND)}). For anything else start a run in another output.dir"
    )
