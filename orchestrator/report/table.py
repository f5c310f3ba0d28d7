"""The table of trials, one row each, as CSV."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.storage.files import write_csv

TRIAL_COLUMNS = (
    "trial_id", "recipe", "state", "seed", "phase", "task_score", "held_out_score", "asr", "over_refusal",
    "degradation", "degradation_lower", "degradation_upper",
    "over_refusal_rise", "over_refusal_rise_lower", "over_refusal_rise_upper", "verdict", "prompts", "stopped_early", "seconds",
)  # fmt: skip
"""Fixed columns of trials.csv, before the `params.*` ones."""


def trial_row(result: Any, judgement: Any | None) -> dict[str, Any]:
    """One line of trials.csv from a TrialResult and its Judgement (None: the trial was never judged).

    Figures that were not measured are None; nothing is filled in for them.
    """
    row = {
        "trial_id": result.trial_id,
        "recipe": result.recipe,
        "state": result.state,
        "seed": result.seed,
        "phase": result.phase,
        "task_score": result.task.score if result.task else None,
        "held_out_score": result.confirmation.score if result.confirmation else None,
        "seconds": result.seconds.get("total"),
        "verdict": getattr(judgement, "verdict", None),
        "asr": getattr(judgement, "asr", None),
        "over_refusal": getattr(judgement, "over_refusal", None),
        "prompts": sum(len(suite.ids) for suite in result.suites.values()) or None,
        "stopped_early": getattr(judgement, "screened", None),
    }
    for name in ("degradation", "over_refusal_rise"):
        estimate = getattr(judgement, name, None)
        row[name] = getattr(estimate, "value", None)
        row[f"{name}_lower"] = getattr(estimate, "lower", None)
        row[f"{name}_upper"] = getattr(estimate, "upper", None)
    row.update({f"params.{name}": value for name, value in result.params.items()})
    return row


def write_trials_csv(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Replace trials.csv: TRIAL_COLUMNS, then every `params.*` column that any row has, in alphabetical order.

    Missing values and NaN are empty cells; texts that a spreadsheet would run: see `cells`. No rows: the header alone. Raises StorageError, or
    ValueError for a column that is neither.
    """
    rows = list(rows)
    extra = sorted({name for row in rows for name in row} - set(TRIAL_COLUMNS))
    stray = [name for name in extra if not name.startswith("params.")]
    if stray:
        raise ValueError(f"trials.csv has no column {stray[0]!r}; columns are {', '.join(TRIAL_COLUMNS)} and params.*")
    return write_csv(path, rows, [*TRIAL_COLUMNS, *extra])
