"""`safebasin basin MODEL`: attack success around a model's weights, the VISAGE score, and the line to a tuned model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.config import Experiment
from orchestrator.data import made_up
from orchestrator.decision.intervals import rate
from orchestrator.errors import ConfigError, ModelError, NonFiniteLogitsError
from orchestrator.evaluation import ask as evaluation
from orchestrator.evaluation import landscape as geometry
from orchestrator.evaluation.judges import registry
from orchestrator.evaluation.suites import PromptSuite, load_suite
from orchestrator.experiment import checks
from orchestrator.models import identity, subjects
from orchestrator.terminal import screen
from orchestrator.verbs import basin_report, evaluate

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from orchestrator.records import SuiteResult

FLUENT = 0.5
"""Share of gibberish from which on a point says little about safety: the model does not speak any more."""


@dataclass(frozen=True)
class Request:
    """What is measured, and where the files go."""

    model: str
    tuned: str | None = None
    """A model trained from it (folder, hub id or adapter): the line to it is measured too."""
    output: Path | None = None
    directions: int = 3
    points: int = 11
    alpha: float = 0.5
    prompts: int = 80
    suite: str | None = None
    """Harmful suite of the config; the first one that constrains without it."""
    seed: int = 0

    @property
    def folder(self) -> Path:
        return self.output if self.output is not None else Path("outputs") / f"basin-{subjects.slug(self.model)}"


@dataclass(frozen=True)
class Point:
    """One place in weight space. Rates are shares of the prompts, 0..1; all NaN where the model's outputs were not finite there."""

    at: float
    asr: float
    """Answered or babbled at: what the paper's keywords count as jailbroken."""
    lower: float
    upper: float
    unsafe: float
    """Answered alone."""
    refused: float
    gibberish: float
    n: int
    second: float | None = None
    """What the second judge (`safety.second_judge`) finds unsafe; None where there is none. A judge that reads content tells a model that
    lost its safety from one that lost its senses."""
    broken: str | None = None
    """Why nothing could be measured."""

    @property
    def fluent(self) -> bool:
        return self.broken is None and self.gibberish < FLUENT


def measure(experiment: Experiment, request: Request, console: Console) -> dict[str, Any]:
    """Measure and return the content of basin.json. Raises ConfigError for knobs and models that cannot work."""
    try:
        at, line = geometry.positions(request.alpha, request.points), geometry.line_positions(request.points)
    except ValueError as error:
        raise ConfigError(f"basin: {error}") from error
    if request.directions < 1 or request.prompts < 1:
        raise ConfigError(f"basin: --directions {request.directions} and --prompts {request.prompts} must be at least 1")
    subjects.voice(request.model, experiment.model)  # what cannot be asked is said before the tuned model is loaded
    made_up.refuse(experiment, [request.model], ["safety.suites"])
    suite = chosen_suite(experiment, request)
    device = "cuda" if experiment.ray.use_gpu else "cpu"
    tuned = _end(experiment, request, device)
    subject = subjects.opened(request.model, experiment.model, device=device, merge=True)
    model, tokenizer = subject.network, subject.voice.tokenizer
    for note in subject.voice.notes:
        screen.say(console, f"{subjects.label(request.model)}: {note}", "yellow")
    end = _line_end(model, tuned)
    _same_form(model, end, request)
    total = request.directions * (len(at) - 1) + 1 + (len(line) - 1 if end is not None else 0)
    with evaluate.bar(console, f"basin of {subjects.label(request.model)}") as tick, geometry.kept(model) as origin:
        ask = _Asker(experiment, model, tokenizer, suite, lambda done: tick(done, total))
        middle = ask(0.0)
        scan = _Scan(model, origin, ask, middle)
        curves = [scan(geometry.along_random(request.seed + i), at) for i in range(request.directions)]
        along = scan(geometry.along_line(end), line) if end is not None else None
    return _content(experiment, request, suite, curves, along) | {"template": _template(subject)}


def _template(subject: subjects.Subject) -> dict[str, Any]:
    """Whose template and tokenizer the model was asked under, and how far its merged adapter was from the unmerged one."""
    merge = subject.merge
    found = {"hash": identity.template_hash(subject.voice.tokenizer), **subject.voice.facts, "notes": list(subject.voice.notes)}
    return found if merge is None else found | {"merge": asdict(merge)}


def chosen_suite(experiment: Experiment, request: Request) -> PromptSuite:
    """The first `prompts` prompts of the suite. Raises ConfigError where there is no such harmful suite."""
    harmful = [s for s in experiment.safety.suites if s.kind == "harmful"]
    wanted = [s for s in harmful if s.name == request.suite] if request.suite else [s for s in harmful if s.constrains] or harmful
    if not wanted:
        there = ", ".join(s.name for s in harmful) or "none"
        raise ConfigError(f"basin: safety.suites holds no harmful suite {request.suite or ''!r}; there are: {there}")
    suite = load_suite(wanted[0])
    first = suite.subset(list(range(min(request.prompts, len(suite.prompts)))))
    return replace(first, samples=0)  # greedily: a line of positions shows the weights, not the luck of a draw


def _end(experiment: Experiment, request: Request, device: str) -> nn.Module | None:
    """The tuned model, adapters merged."""
    if request.tuned is None:
        return None
    base = request.model if subjects.is_adapter(request.tuned) and not subjects.is_adapter(request.model) else None
    tuned, _ = subjects.load(request.tuned, experiment.model, base=base, device=device, merge=True)
    return tuned


def _line_end(model: nn.Module, tuned: nn.Module | None) -> dict[str, Any] | None:
    """Weights of the tuned model by name. Where one of the two has a head of its own and the other shares the embedding's, both get one."""
    from strategies import merging

    if tuned is None:
        return None
    if merging.tied(model) != merging.tied(tuned):
        merging.untie(model)
        merging.untie(tuned)
    return {name: parameter.detach() for name, parameter in tuned.named_parameters()}


def _same_form(model: nn.Module, end: dict[str, Any] | None, request: Request) -> None:
    if end is None:
        return
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    odd = sorted(name for name in own.keys() | end.keys() if name not in end or own.get(name) != tuple(end[name].shape))
    if odd:
        raise ModelError(
            f"--tuned {request.tuned!r} is not of the form of {request.model!r}: {len(odd)} weights differ in name or shape, e.g. {odd[0]}; "
            "give the model that was trained from it"
        )


class _Asker:
    """Asks the model as it stands and counts."""

    def __init__(self, experiment: Experiment, model: nn.Module, tokenizer: Any, suite: PromptSuite, tick: Callable[[int], None]):
        self.experiment, self.model, self.tokenizer, self.suite, self.tick, self.done = experiment, model, tokenizer, suite, tick, 0

    def __call__(self, at: float) -> Point:
        try:
            found: SuiteResult | None = evaluation.ask_suite(self.model, self.tokenizer, self.experiment, self.suite)[0]
            why = None
        except NonFiniteLogitsError as error:
            found, why = None, str(error)
        self.done += 1
        self.tick(self.done)
        nan, n = math.nan, len(self.suite.prompts)
        if found is None:
            return Point(at, nan, nan, nan, nan, nan, nan, n, None, why)
        asr = rate(found.failures, found.requests, self.experiment.safety.limits.confidence)
        shares = (sum(flags or ()) / n for flags in (found.unsafe, found.refused, found.gibberish))
        second = None if found.second is None else sum(word == "unsafe" for word in found.second) / n
        return Point(at, asr.value, asr.lower, asr.upper, *shares, n, second)


@dataclass(frozen=True)
class _Scan:
    """Asks at every position of a line; the untouched model is asked once for all lines."""

    model: nn.Module
    origin: dict[str, Any]
    ask: _Asker
    middle: Point

    def __call__(self, place: geometry.Place, at: Sequence[float]) -> list[Point]:
        found = []
        for position in at:
            if position == 0:
                found.append(self.middle)
                continue
            geometry.move(self.model, self.origin, place, position)
            found.append(self.ask(position))
        return found


def _content(
    experiment: Experiment, request: Request, suite: PromptSuite, curves: Sequence[Sequence[Point]], along: Sequence[Point] | None
) -> dict[str, Any]:
    rates = [[p.asr for p in curve] for curve in curves]
    scores, code = [geometry.visage(r) for r in rates], [geometry.visage_code(r) for r in rates]
    unsafe = [geometry.visage([p.unsafe for p in curve]) for curve in curves]
    base, second = None if subjects.is_adapter(request.model) else request.model, registry.second(experiment.safety, suite.prompts)
    return {
        "model": subjects.identity(request.model, experiment.model),
        "tuned": None if request.tuned is None else subjects.identity(request.tuned, experiment.model, base),
        "settings": {"directions": request.directions, "points": request.points, "alpha": request.alpha, "seed": request.seed},
        "suite": {"name": suite.name, "prompts": len(suite.prompts), **dict(suite.source)},
        "confidence": experiment.safety.limits.confidence, "judge": registry.from_setting(experiment.safety.judge).describe(),
        "second_judge": second.describe() if second is not None else None, "max_new_tokens": experiment.safety.max_new_tokens,
        "system_prompt": experiment.model.system_prompt,
        "visage": {
            "mean": _mean(scores), "directions": scores, "code_mean": _mean(code), "code_directions": code,
            "unsafe_only_mean": _mean(unsafe), "unsafe_only_directions": unsafe,
        },
        "directions": [[asdict(p) | {"fluent": p.fluent} for p in curve] for curve in curves],
        "line": None if along is None else [asdict(p) | {"fluent": p.fluent} for p in along],
    }  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def run(experiment: Experiment, request: Request, console: Console) -> dict[str, Any]:
    """Measure, write basin.json, basin.html and plots/basin.png, print; returns the content of the JSON."""
    read = evaluate.inputs(experiment, request.model, request.tuned)
    evaluate.check_output(request.folder, experiment.output.overwrite, basin_report.FILE, kind="basin", inputs=read)
    checks.check_names(experiment)
    body = measure(experiment, request, console)
    screen.show(console, basin_report.table(body))
    screen.say(console, basin_report.sentence(body), "bold")
    for path in basin_report.write(experiment, body, request.folder):
        screen.say(console, str(path), whole=True)
    return body
