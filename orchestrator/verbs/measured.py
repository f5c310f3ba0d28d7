"""What the Python API gives back of models that were measured or checked: tables as DataFrames, the pages' pictures as figures."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.report.plots.canvas import Plot
from orchestrator.verbs import check as checking
from orchestrator.verbs import compare as comparing
from orchestrator.verbs import evaluate_report
from orchestrator.verbs.check import Checked
from orchestrator.verbs.compare import Comparison
from orchestrator.verbs.evaluated import Evaluated
from orchestrator.verbs.results import Pictured

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from orchestrator.decision.limits import Verdict


@dataclass(frozen=True)
class Evaluation(Pictured):
    """A model measured, before and after where a baseline was named."""

    found: Evaluated
    folder: Path
    """With evaluation.json, evaluation.html and CSV files."""

    @property
    def verdict(self) -> Verdict | None:
        """None without a baseline, or where no suite constrains."""
        return self.found.verdict

    @property
    def sentence(self) -> str:
        return evaluate_report.sentence(self.found)

    @property
    def exit_code(self) -> int:
        """As the command line ends: 0, 3 where a limit is not clearly kept, 1 where no limit had a figure."""
        return self.found.exit_code

    @property
    def warnings(self) -> list[str]:
        """What must be known beside the verdict: rises that no limit holds, suites that can show none."""
        return [alert.text for alert in evaluate_report.alerts(self.found)] if self.found.before is not None else []

    @cached_property
    def rates(self) -> pandas.DataFrame:
        """One row a suite with the columns of rates.csv: rate, before and paired rise with both ends; NaN where not measured."""
        import pandas

        return pandas.DataFrame(evaluate_report.rate_rows(self.found), columns=list(evaluate_report.COLUMNS))

    @cached_property
    def plots(self) -> dict[str, Plot]:
        """The page's pictures by name."""
        return {one.name: one for one in evaluate_report.pictures(self.found)}

    def plot_rates(self) -> Figure:
        """Attack success and over-refusal, before and after."""
        return self.plot("rates")

    def _repr_html_(self) -> str:
        return _shown(self.sentence, self.rates)


@dataclass(frozen=True)
class ModelComparison(Pictured):
    """Models side by side; differences are against the first."""

    found: Comparison
    folder: Path
    """With comparison.csv and comparison.html."""

    @property
    def sentence(self) -> str:
        return comparing.sentence(self.found)

    @property
    def warnings(self) -> list[str]:
        """Where figures that stand side by side were not measured alike."""
        return comparing.warnings(self.found)

    @cached_property
    def rates(self) -> pandas.DataFrame:
        """One row a suite and model with the columns of comparison.csv."""
        import pandas

        return pandas.DataFrame(comparing.rows(self.found), columns=list(comparing.COLUMNS))

    @cached_property
    def plots(self) -> dict[str, Plot]:
        """The page's pictures by name."""
        return {one.name: one for one in comparing.pictures(self.found)}

    def plot_rates(self) -> Figure:
        """Attack success and over-refusal of every model."""
        return self.plot("rates")

    def _repr_html_(self) -> str:
        return _shown(self.sentence, self.rates)


@dataclass(frozen=True)
class Gate:
    """A policy held against measured evidence."""

    made: Checked
    evidence: Path
    """The evidence file that was written; `safebasin check --verify` looks it over."""

    @property
    def passed(self) -> bool:
        """Whether every rule is shown to be kept."""
        return self.made.passed

    @property
    def verdict(self) -> str:
        """`passed` or `failed`."""
        return "passed" if self.passed else "failed"

    @property
    def sentence(self) -> str:
        return checking.sentence(self.made)

    @property
    def conditions(self) -> list[str]:
        """What a release must keep for the figures to hold."""
        return checking.conditions(self.made)

    @cached_property
    def rules(self) -> pandas.DataFrame:
        """One row a rule: rule, passed, on what, its limit, its figure with both ends, why it is not kept."""
        import pandas

        rows = []
        for one in self.made.findings:
            ends = asdict(one.figure) if one.figure is not None else {}
            rows.append([one.rule, one.passed, one.on, one.limit, *(ends.get(name) for name in ("value", "lower", "upper", "n")), one.text])
        return pandas.DataFrame(rows, columns=["rule", "passed", "on", "limit", "value", "lower", "upper", "n", "text"])

    def register(self, name: str) -> str:
        """Make the model a version of `name` in MLflow's registry and point the alias safe-best to it, on a pass only; what was done, in a
        sentence. Raises ConfigError for a name that cannot be one, TrackingError."""
        checking.check_register(name)
        return checking.register(self.made, name, self.evidence)

    def _repr_html_(self) -> str:
        return _shown(self.sentence, self.rules)


def _shown(sentence: str, table: pandas.DataFrame) -> str:
    return f"<p><b>{html.escape(sentence)}</b></p>{table.to_html(max_rows=40, escape=True)}"
