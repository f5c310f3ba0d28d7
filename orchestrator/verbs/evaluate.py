"""`safebasin evaluate`: suites, attacks, judges and the task on any model, before and after where a baseline is named; JSON, HTML and CSV.

Runs in this process, on one device, without Ray: a model somebody else trained is asked exactly what a trial of a search is asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import config
from orchestrator.config import Experiment
from orchestrator.data import made_up
from orchestrator.decision import limits
from orchestrator.evaluation import ask, external, generate_vllm
from orchestrator.evaluation.suites import PromptSuite, load_suite
from orchestrator.experiment import places
from orchestrator.models import contents, identity, loading, subjects
from orchestrator.records import TrialResult
from orchestrator.report import page
from orchestrator.storage import files, ownership
from orchestrator.storage.paths import folder_name
from orchestrator.terminal import screen
from orchestrator.trial import task_rows as rows_of_task
from orchestrator.verbs import evaluate_report  # fmt: skip
from orchestrator.verbs.evaluated import FILE, FORMAT, Evaluated, Request

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.data.conversations import Conversation


def evaluate(experiment: Experiment, request: Request, console: Console) -> Evaluated:
    """Measure, write `evaluation.json`, `evaluation.html` and CSV files into the request's folder, print the table.

    Raises ConfigError (or a subclass) for what cannot work, before any model is asked; JudgeError and NonFiniteLogitsError as they come:
    no file then says that a model was measured.
    """
    check_output(request.folder, experiment.output.overwrite, inputs=inputs(experiment, request.model, request.baseline))
    found = run(experiment, request, console)
    paths = write(found, request.folder)
    evaluate_report.show(found, console)
    style = {"feasible": "bold green", "infeasible": "bold red"}.get(found.verdict or "", "bold")
    screen.say(console, evaluate_report.sentence(found), style)
    for path in paths[:2]:
        screen.say(console, str(path), whole=True)
    return found


def check_output(
    folder: Path, overwrite: bool, name: str = FILE, *, kind: str = "evaluation", inputs: Sequence[places.Input] = ()
) -> None:  # fmt: skip
    """Refuse a folder that is not ours to take, holds an earlier result or somebody else's files of our names, or is none. Raises ConfigError."""
    folder_name(folder, "--output")
    places.check_output(folder, kind, inputs, field="--output", result=name, overwrite=overwrite)


def inputs(experiment: Experiment, *models: str | None) -> list[places.Input]:
    """What is read: the experiment's files, and models beside its own."""
    return places.inputs(experiment) + [("the model", path) for name in models if name and (path := places.local(name)) is not None]


def run(experiment: Experiment, request: Request, console: Console) -> Evaluated:
    """Load and measure the baseline (where one is named) and the model, one after the other; nothing is written but kept generations."""
    from orchestrator.evaluation.judges import registry
    from orchestrator.experiment import checks

    checks.check_names(experiment)
    checks.check_generation(experiment)
    asked = subjects.voice(request.model, experiment.model, request.baseline)
    made_up.refuse(experiment, [request.model, *([request.baseline] if request.baseline else [])], ["safety.suites"])
    for line in page.pocket_note(experiment):
        screen.say(console, f"note: {line}", "yellow")
    suites = tuple(load_suite(suite) for suite in experiment.safety.suites)
    for suite in suites:
        if suite.kind != "choice":
            registry.pair(experiment.safety, suite.prompts)  # a judge that cannot be had is said before a model is loaded
    rows = task_rows(experiment, request)
    own = subjects.identity(request.model, experiment.model, request.baseline)
    base = subjects.identity(request.baseline, experiment.model) if request.baseline is not None else None
    measure = _Measure(experiment, suites, rows, request.folder, console)
    before = None
    if request.baseline is not None:
        under = subjects.for_base(request.baseline, experiment.model, asked)
        before = replace(measure, like=under)("baseline", request.baseline, None)
    result = measure("model", request.model, request.baseline)
    judged = limits.judge(result, before, experiment.safety.limits).constraints if before is not None else ()
    return Evaluated(experiment, own, base, result, before, judged)


def task_rows(experiment: Experiment, request: Request) -> Sequence[Conversation] | None:
    """Evaluation rows of the task; None where it is switched off, or where nobody named one (a default, or a preset's made-up one for
    another model, is no task of anyone's)."""
    lent = made_up.strayed(experiment, [request.model], ["task.data", "task.eval_data"])
    if not request.task or "task" not in experiment.model_fields_set or lent:
        return None
    found = rows_of_task.load(experiment)
    return found.evaluation + found.confirmation


@dataclass(frozen=True)
class _Measure:
    """Asks one model after the other the same prompts."""

    experiment: Experiment
    suites: Sequence[PromptSuite]
    rows: Sequence[Conversation] | None
    folder: Path
    console: Console
    like: config.Model | None = None
    """Settings of the model section where they are not the experiment's."""

    def __call__(self, trial_id: str, name: str, base: str | None) -> TrialResult:
        """The record of one model; phase `baseline` or, so that suites held out for confirmation count, `confirm`."""
        started, experiment = time.perf_counter(), self.experiment
        device = "cuda" if experiment.ray.use_gpu else "cpu"
        like = self.like or experiment.model
        subject = subjects.opened(name, like, base=base, device=device)
        model, tokenizer, told = subject.network, subject.voice.tokenizer, list(subject.voice.notes)
        if self.like not in (None, experiment.model):
            told.append("has no chat template of its own and is asked under that of the model")
        for note in told:
            screen.say(self.console, f"{trial_id} {subjects.label(name)}: {note}", "yellow")
        phase = "baseline" if trial_id == "baseline" else "confirm"
        result = TrialResult(trial_id, "", {}, 0, phase, "complete")
        weights = generate_vllm.named(*subjects.files(name, like, base))
        with (
            bar(self.console, f"{trial_id} {subjects.label(name)}") as progress,
            generate_vllm.generator(model, tokenizer, experiment, device, weights=weights) as generator,
        ):
            result.facts |= generate_vllm.facts(generator, model)
            result.task, result.suites, answers = ask.evaluate(
                model, tokenizer, experiment, self.suites, self.rows, ask.Asking(progress=progress, generator=generator)
            )
        measured = external.measure(model, tokenizer, experiment.safety.external)
        if measured:
            result.facts["external"] = measured
        result.facts["template"] = {
            "hash": identity.template_hash(tokenizer), "evaluation_system_prompt": experiment.model.system_prompt, **subject.voice.facts,
            **({"template_of": "the model measured"} if self.like not in (None, experiment.model) else {}), "notes": told,
        }  # fmt: skip
        result.facts[contents.FACT] = contents.fact(_folder(name, like, base))
        result.seconds = {"total": time.perf_counter() - started}
        if answers is not None:
            with ownership.active(self.folder, "evaluation"):
                ask.write_generations(self.folder / ("generations.jsonl" if trial_id == "model" else f"generations-{trial_id}.jsonl"), answers)
        return result


def _folder(name: str, like: config.Model, base: str | None) -> Path | None:
    """Where the files of a model, or of an adapter, lie; None for what only the hub's cache holds."""
    whole, adapter = subjects.files(name, like, base)
    found = Path(adapter if adapter is not None else loading.resolve(whole))
    return found if found.is_dir() else None


class bar:
    """A progress bar as a context manager; inside, a function (done, total)."""

    def __init__(self, console: Console, text: str):
        parts = ("description", "bar", "count", "elapsed", "left")
        self._bar = screen.bar(console, *parts, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(text, total=None)

    def __enter__(self) -> Callable[[int, int], None]:
        self._bar.start()
        return lambda done, total: self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def write(found: Evaluated, folder: Path) -> list[Path]:
    """evaluation.json, evaluation.html, rates.csv and, with a baseline, transitions.csv, flipped.csv, categories.csv; their paths."""
    with ownership.active(folder, "evaluation"):
        html = evaluate_report.write(found, folder)
        return [files.write_json(folder / FILE, content(found)), *html]


def content(found: Evaluated) -> dict[str, Any]:
    """What evaluation.json says; `result` and `before` hold every single verdict, as a trial's result.json does."""
    from orchestrator import __version__, redaction
    from orchestrator.evaluation.judges import registry

    safety = found.experiment.safety
    return {
        "format": FORMAT, "made_by": f"safebasin {__version__} evaluate", "model": found.model, "baseline": found.baseline,
        "verdict": found.verdict, "sentence": evaluate_report.sentence(found), "limits": safety.limits.model_dump(mode="json"),
        "constraints": found.constraints, "rates": evaluate_report.rate_rows(found),
        "settings": {
            "judge": registry.from_setting(safety.judge).describe(),
            "generation": found.result.facts.get("generation", {"backend": "transformers"}),
            "max_new_tokens": safety.max_new_tokens, "system_prompt": found.experiment.model.system_prompt,
            "template_hash": found.result.facts["template"]["hash"], "template_of": found.result.facts["template"].get("template_of"),
            "tokenizer_of": found.result.facts["template"].get("tokenizer_of"),
        },
        "config": redaction.redact_text(config.dump_yaml(found.experiment)),
        "result": found.result.to_dict(), "before": None if found.before is None else found.before.to_dict(),
    }  # fmt: skip


