"""The Python API: what the command line does, as functions with typed results. `from orchestrator import Experiment, run, evaluate, ...`

Each function is its verb: the same checks, files, exit codes and sentences. It prints how it goes (in a notebook below the cell) unless
`progress=False`. Errors that a user can mend are SafebasinError with a sentence. Nothing here is imported by `import orchestrator` itself.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.config import Experiment
from orchestrator.decision import selection as decision_selection
from orchestrator.experiment import records
from orchestrator.experiment import resume as resuming
from orchestrator.report import figures
from orchestrator.terminal import screen
from orchestrator.verbs import check as checking
from orchestrator.verbs import check_seal, evaluated, opening, running
from orchestrator.verbs import compare as comparing
from orchestrator.verbs import evaluate as evaluating
from orchestrator.verbs import reproduce as reproducing
from orchestrator.verbs.measured import Evaluation, Gate, ModelComparison
from orchestrator.verbs.opening import Given
from orchestrator.verbs.reproduce import Reproduction
from orchestrator.verbs.results import Chosen, RunResult

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "Chosen", "Evaluation", "Experiment", "Gate", "ModelComparison", "Reproduction", "RunResult", "check", "compare", "evaluate", "open_run",
    "reproduce", "resume", "run",
]  # fmt: skip


def run(config: Given = None, *overrides: str, progress: bool = True) -> RunResult:
    """Run an experiment: baseline, search, confirmation, report (`safebasin run`). Blocks until it ends.

    `config`: path of a YAML file, name of a preset (`high`), sections as a mapping, an Experiment, or None for the pocket preset; `overrides`:
    `key=value` texts as on the command line.

    An outcome without a feasible model is a result, not an error (`verdict`). An interrupt (Ctrl-C, a notebook's stop button) ends it cleanly; the
    result then says `stopped`, and `resume(result.folder)` goes on. Raises SafebasinError for what cannot work or cannot be gone on with.
    """
    return _run(opening.load(config, overrides), progress, False)


def resume(folder: str | Path, *overrides: str, retry_failed: bool = False, progress: bool = True) -> RunResult:
    """Go on with a run that was interrupted, or give one more trials: `resume(folder, "search.trials=+20")` (`safebasin resume`).

    Raises ConfigError where there is no run, or for an override that finished trials depend on.
    """
    return _run(opening.without_gpu_warnings(resuming.load(folder, overrides)), progress, retry_failed)


def reproduce(folder: str | Path, output: str | Path | None = None, progress: bool = True) -> Reproduction:
    """Run a run again (same config, seeds, data) into a new folder and compare trial by trial (`safebasin reproduce`). A difference is a result
    (`same`). Raises ConfigError where there is no run, or the new folder holds something."""
    found, _ = reproducing.reproduce(str(folder), None if output is None else Path(output), _console(progress))
    return found


def _run(made: Experiment, progress: bool, retry_failed: bool) -> RunResult:
    outcome = running.run(made, _console(progress), retry_failed)
    found = records.read(made.output_address or str(outcome.folder))
    selection = outcome.selection
    verdict = "stopped" if outcome.stopped or selection is None else selection.outcome
    return RunResult(replace(found, experiment=made), verdict, outcome.sentence, outcome.exit_code)


def open_run(folder: str | Path) -> RunResult:
    """A run as its records say, finished or not, in a folder or at an address; nothing of it is touched. Raises ConfigError where there is none."""
    found = records.read(str(folder))
    if found.baseline is None:
        return RunResult(found, "stopped", f"{found.shown}: the untouched model was not measured yet", 1)
    selection = decision_selection.best(found.rows())
    ended = found.handed_over and not found.open
    sentence = figures.headline(selection, found.baseline, found.experiment, stopped=not ended)
    code = {"feasible": 0, "nothing feasible": 3}.get(selection.outcome, 1)
    return RunResult(found, selection.outcome if ended else "stopped", sentence, code if ended else 1)


def evaluate(
    model: str | Path,
    *overrides: str,
    baseline: str | Path | None = None,
    config: Given = None,
    output: str | Path | None = None,
    task: bool = True,
    progress: bool = True,
) -> Evaluation:
    """Measure suites, attacks and task of any model or adapter, before and after where a baseline is named (`safebasin evaluate`).

    Files go to `output`, else below `outputs/`. Raises ConfigError (or a subclass) for what cannot work, before any model is asked.
    """
    name, base = str(model), None if baseline is None else str(baseline)
    request = evaluated.Request(name, base, None if output is None else Path(output), task)
    found = evaluating.evaluate(opening.around(config, overrides, name, base), request, _console(progress))
    return Evaluation(found, request.folder)


def compare(
    *models: str | Path, baseline: str | Path | None = None, config: Given = None, output: str | Path | None = None, progress: bool = True
) -> ModelComparison:
    """Put models, evaluations (their folders) and runs side by side; what is neither is evaluated now (`safebasin compare`).

    Words with `=` among `models` are overrides. Raises ConfigError for fewer than two, or one named twice.
    """
    overrides, names = comparing.words([str(one) for one in models])
    base = None if baseline is None else str(baseline)
    folder = Path(output) if output is not None else comparing.FOLDER
    found = comparing.compare(opening.around(config, overrides, names[0] if names else "pocket", base), names, folder, _console(progress), base)
    return ModelComparison(found, folder)


def check(
    target: str | Path,
    policy: str | Path,
    *,
    evidence: str | Path | None = None,
    base: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    key_file: str | Path | None = None,
) -> Gate:
    """Hold a policy against measured evidence and write the evidence file (`safebasin check`). A rule that is not kept is a result (`passed`).

    `target`: folder of a run, of an evaluation, or of a model in one. Raises ConfigError, SafebasinError for evidence that is damaged.
    """
    place, where = None if evidence is None else str(evidence), None if output is None else Path(output)
    key = check_seal.key_of(None if key_file is None else str(key_file))
    request = checking.Request(str(target), str(policy), place, base, where, overwrite, key)
    checking.check_output(request)
    made = checking.check(request)
    return Gate(made, checking.write(made, request.folder))


def _console(progress: bool) -> Console:
    return screen.console(steady=not screen.in_notebook()) if progress else screen.silent()
