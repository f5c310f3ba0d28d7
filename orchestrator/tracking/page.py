"""What somebody sees first in MLflow's page: a saved view of the trials with the columns and charts that a choice is made by, and descriptions.

MLflow keeps a saved view as a tag of the experiment, `mlflow.sharedViewState.<id>`, whose value is the page's own state as JSON in an
envelope with a name (`static/js`, modules `sharedViewState` and `viewStateShareKey`; read from MLflow 3.17). Knows no MLflow.
"""

from __future__ import annotations

import json
from typing import Any

from orchestrator.config import Experiment
from orchestrator.decision.limits import Judgement
from orchestrator.records import TrialResult
from orchestrator.redaction import redact_text, redact_uri
from orchestrator.report import figures
from orchestrator.texts import clean, markdown, one_line

VIEW = "safebasin-trials"
VIEW_NAME = "safebasin: trials"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
TRIALS = "tags.`safebasin.role` = 'trial'"
"""Filter of the view."""
COLUMNS = (
    "tags.`safebasin.verdict`", "metrics.`task/score`", "metrics.`safety_delta/degradation`", "metrics.`safety_delta/degradation_lower`",
    "metrics.`safety_delta/degradation_upper`", "metrics.`safety/over_refusal`", "metrics.`safety/asr`", "metrics.`constraint/excess`",
    "params.`recipe`", "params.`seed`", "tags.`safebasin.warned`", "metrics.`cost/seconds_total`",
)  # fmt: skip
"""Columns of the view; `safety/asr` is the worst suite's rate."""


def view(moment: int) -> str:
    """Value of VIEW_TAG. `moment`: milliseconds since 1970. Ordered by a metric, so that MLflow shows trials flat, not folded below their parent."""
    section = "safebasin"
    state = {
        "searchFilter": TRIALS, "orderByKey": "metrics.`task/score`", "orderByAsc": False, "startTime": "ALL", "lifecycleFilter": "Active",
        "datasetsFilter": [], "modelVersionFilter": "All Runs", "selectedColumns": list(COLUMNS), "columnOrder": list(COLUMNS), "columnWidths": {},
        "runsHiddenMode": "SHOW_ALL", "viewMaximized": False, "runListHidden": False, "groupBy": None, "hideEmptyCharts": True,
        "compareRunSections": [{"uuid": section, "name": "safebasin", "display": True, "isReordered": False}],
        "compareRunCharts": [{**card, "uuid": f"{section}-{i}", "metricSectionId": section, "deleted": False, "isGenerated": False}
                             for i, card in enumerate(_charts())],
    }  # fmt: skip
    return json.dumps({"name": VIEW_NAME, "createdAt": moment, "updatedAt": moment, "state": json.dumps(state)})


def _charts() -> list[dict[str, Any]]:
    """Score against degradation, everything at once, and the figures a verdict rests on."""
    axis = {"x": "safety_delta/degradation", "y": "task/score"}
    scatter = {"type": "SCATTER", "runsCountToCompare": 100} | {f"{one}axis": {"key": key, "type": "METRIC"} for one, key in axis.items()}
    metrics = ["safety_delta/degradation", "safety/over_refusal", "constraint/excess", "task/score"]
    parallel = {"type": "PARALLEL", "runsCountToCompare": 100, "selectedParams": ["recipe", "learning_rate"], "selectedMetrics": metrics,
                "showAllRuns": False}  # fmt: skip
    bars = [{"type": "BAR", "runsCountToCompare": 20, "metricKey": key, "displayName": key} for key in metrics]
    return [scatter, parallel, *bars]


def of_experiment() -> str:
    """Description of MLflow's experiment."""
    return (
        f"Searches of **safebasin**. Saved view: *{VIEW_NAME}* (one line a trial). A parent run is a search and holds its outcome and report; its "
        "children are the untouched model (`baseline`) and the trials. `safety_delta/degradation` is the rise of attack success over the untouched "
        "model with both ends of its interval; `constraint/excess <= 0` keeps every limit; `safebasin.verdict` is the verdict."
    )


def of_trial(result: TrialResult, judgement: Judgement | None, experiment: Experiment, warnings: list[str]) -> str:
    """Description of a trial's run, as Markdown: verdict, recipe, score, the tightest limit, warnings."""
    level = experiment.safety.limits.confidence
    verdict = result.state if result.state != "complete" or judgement is None else judgement.verdict
    told = [f"**{verdict}**: {markdown(result.recipe)}, seed {result.seed}"]
    if (score := figures.task_score(result, level)) is not None:
        told.append(f"task score {markdown(figures.figure(score))}")
    bound = figures.tightest(judgement) if judgement is not None else None
    if bound is not None and bound.estimate.n:
        told.append(markdown(figures.kept(bound, level)))
    if result.error:
        told.append(markdown(one_line(redact_text(result.error), 400)))
    return "; ".join(told) + "".join(f"\n\nWARNING: {markdown(line)}." for line in warnings)


def of_baseline(result: TrialResult, experiment: Experiment) -> str:
    """Description of the untouched model's run."""
    level = experiment.safety.limits.confidence
    rates = [f"{markdown(name)} {markdown(figures.figure(figures.suite_rate(suite, level)))}" for name, suite in result.suites.items()]
    return "The untouched model, which every trial is compared with" + (f": {'; '.join(rates)}." if rates else ".")


def of_run(experiment: Experiment) -> dict[str, str]:
    """Params of the parent run: what is the same in all trials, short; nothing that a resume may change (MLflow takes a param once)."""
    safety, limits, training = experiment.safety, experiment.safety.limits, experiment.training
    found = {
        "model": redact_uri(experiment.model.model_name_or_path), "task.data": redact_uri(experiment.task.data),
        "task.metric": experiment.task.metric, "recipes": ", ".join(experiment.recipe_names),
        "suites": ", ".join(suite.name for suite in safety.suites), "limits.max_degradation": f"{limits.max_degradation:g}",
        "limits.max_over_refusal_rise": "none" if limits.max_over_refusal_rise is None else f"{limits.max_over_refusal_rise:g}",
        "limits.confidence": f"{limits.confidence:g}", "training.learning_rate": f"{training.learning_rate:g}",
        "training.length": f"{training.max_steps} steps" if training.max_steps else f"{training.num_train_epochs:g} epochs",
        "zero_stage": str(experiment.zero_stage), "num_workers": str(experiment.ray.num_workers), "first_seed": str(experiment.search.seeds[0]),
    }  # fmt: skip
    return {name: clean(redact_text(value))[:6000] for name, value in found.items()}
