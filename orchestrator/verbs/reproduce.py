"""`safebasin reproduce DIR`: the same run once more, in a new folder, and what came out otherwise: versions, content, trial by trial."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.config import Experiment
from orchestrator.errors import ConfigError, SafebasinError
from orchestrator.experiment import places, records
from orchestrator.experiment.driver import Outcome
from orchestrator.experiment.records import Row, RunRecords
from orchestrator.records import TrialResult
from orchestrator.storage import files, ownership
from orchestrator.storage.paths import folder_name
from orchestrator.terminal import screen
from orchestrator.verbs import opening, running

if TYPE_CHECKING:
    import pandas
    from rich.console import Console

FILE = "reproduction.json"
UNKNOWN = "not written down"


@dataclass(frozen=True)
class Difference:
    """Something that is not the same in both runs."""

    what: str
    there: str
    """In the run that was reproduced."""
    here: str


@dataclass(frozen=True)
class Pair:
    """The same configuration and seed in both runs; None where one of them has it not."""

    recipe: str
    seed: int
    params: dict[str, Any]
    there: str | None
    """Trial id."""
    here: str | None
    score_there: float | None
    score_here: float | None
    asr_there: float | None
    asr_here: float | None
    verdict_there: str | None
    verdict_here: str | None
    prompts: int = 0
    """Safety prompts that both asked."""
    changed: int = 0
    """Of them, answers judged otherwise."""

    @property
    def same(self) -> bool:
        """Both tried it, with the same score, verdict and judgement of every prompt."""
        figures = (self.score_there, self.asr_there, self.verdict_there) == (self.score_here, self.asr_here, self.verdict_here)
        return self.there is not None and self.here is not None and figures and not self.changed


@dataclass(frozen=True)
class Reproduction:
    """Two runs of one config, compared."""

    folder: str
    """The run that was reproduced."""
    output: str
    """The new one."""
    made: tuple[Difference, ...]
    """Versions, content of model, data and suites that differ."""
    pairs: tuple[Pair, ...]
    finished: bool
    """Whether the new run came to its end."""

    @property
    def same(self) -> bool:
        """Whether every trial of either run, and the untouched model, came out the same; False without trials, and for a run that was stopped."""
        return self.finished and bool(self.pairs) and all(pair.same for pair in self.pairs)

    @property
    def trials(self) -> pandas.DataFrame:
        """One row a configuration and seed, the untouched model first: both runs' ids, scores, attack success, verdicts; prompts judged otherwise."""
        import pandas

        return pandas.DataFrame([{**asdict(pair), "same": pair.same} for pair in self.pairs])

    @property
    def exit_code(self) -> int:
        """0 all the same, 3 something differs, 1 stopped before the end."""
        return 1 if not self.finished else 0 if self.same else 3


def reproduce(place: str, output: Path | None, console: Console) -> tuple[Reproduction, Outcome]:
    """Run a run's config again into `output` (`outputs/reproduce-NAME` without it), compare, write FILE there, print what differs.

    Raises ConfigError where there is no run, or the new folder is taken; SafebasinError for one without a record of the untouched model.
    """
    first = records.read(place)
    if first.baseline is None or not first.results:
        raise SafebasinError(f"{place} holds no trial that ended, so there is nothing to compare with; go on with: safebasin resume {place}")
    folder = output or Path("outputs") / f"reproduce-{Path(place.rstrip('/')).name}"
    experiment = opening.without_gpu_warnings(again(first.experiment, folder))
    check_output(folder, place)
    for line in first.troubles:
        screen.say(console, f"warning: {line}", "yellow")
    outcome = running.run(experiment, console)
    found = compared(first, records.read(str(folder.absolute())), finished=not outcome.stopped)
    with ownership.active(folder.absolute(), "run"):
        files.write_json(folder.absolute() / FILE, {"format": 1, "same": found.same, **asdict(found)})
    show(found, console)
    return found, outcome


def check_output(folder: Path, place: str) -> None:
    """Refuse a folder that holds something, or lies in what is read. Looks only. Raises ConfigError."""
    folder_name(folder, "--output")
    places.check(folder, [("the run", path)] if (path := places.local(place)) is not None else [], field="--output")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"--output {str(folder)!r} is not empty; a run is reproduced into a new folder, give another with -o")


def again(experiment: Experiment, folder: Path) -> Experiment:
    """The same experiment, written elsewhere: config, seeds and sampler are kept, and who named data and model stays said."""
    output = experiment.output.model_copy(update={"dir": str(folder.absolute()), "overwrite": False, "resume": False})
    named = experiment.tracking.run_name or f"{experiment.name}, reproduced"
    return experiment.model_copy(update={"output": output, "tracking": experiment.tracking.model_copy(update={"run_name": named})})


def compared(first: RunRecords, second: RunRecords, finished: bool = True) -> Reproduction:
    """What differs between two runs of one config. Trials are the same where recipe, parameters and seed are, whatever their ids."""
    older = Difference("versions", UNKNOWN, ", ".join(f"{name} {version}" for name, version in second.versions.items()))
    made = _differ("version of ", first.versions, second.versions) if first.versions else [older]
    made += _differ("content of ", first.content, second.content)
    rows = [{_key(result): (result, judged) for result, judged in one.rows()} for one in (first, second)]
    pairs = [_pair(rows[0].get(key), rows[1].get(key)) for key in dict.fromkeys([*rows[0], *rows[1]])]
    if first.baseline is not None and second.baseline is not None:
        pairs.insert(0, _of(first.baseline, second.baseline))
    return Reproduction(first.shown, second.shown, tuple(made), tuple(pairs), finished)


def _differ(what: str, there: Mapping[str, str], here: Mapping[str, str]) -> list[Difference]:
    names = sorted({*there, *here})
    return [Difference(what + one, there.get(one, UNKNOWN), here.get(one, UNKNOWN)) for one in names if there.get(one) != here.get(one)]


def _key(result: TrialResult) -> tuple[str, str, int, str]:
    return result.recipe, json.dumps(files.plain(result.params), sort_keys=True), result.seed, result.phase


def _pair(there: Row | None, here: Row | None) -> Pair:
    first, second = (row[0] if row is not None else None for row in (there, here))
    made = _of(first, second)
    judged = [row[1].verdict if row is not None else None for row in (there, here)]
    return Pair(**{**asdict(made), "verdict_there": judged[0], "verdict_here": judged[1]})


def _of(there: TrialResult | None, here: TrialResult | None) -> Pair:
    """Two records of one configuration; verdicts are left out."""
    known = there if there is not None else here
    if known is None:
        raise ValueError("a pair is of at least one record")
    scores = [one.task.score if one is not None and one.task is not None else None for one in (there, here)]
    rates = [_worst(one) for one in (there, here)]
    prompts, changed = _answers(there, here)
    ids = [one.trial_id if one is not None else None for one in (there, here)]
    return Pair(known.recipe or "untouched", known.seed, dict(known.params), *ids, *scores, *rates, None, None, prompts, changed)


def _worst(result: TrialResult | None) -> float | None:
    rates = [suite.rate for suite in result.suites.values() if suite.kind == "harmful" and suite.ids] if result is not None else []
    return max(rates, default=None)


def _answers(there: TrialResult | None, here: TrialResult | None) -> tuple[int, int]:
    """(prompts that both asked, how many of them were judged otherwise)."""
    prompts = changed = 0
    for name, suite in there.suites.items() if there is not None and here is not None else ():
        other = here.suites.get(name)
        after = dict(zip(other.ids, zip(other.unsafe, other.refused, strict=True), strict=True)) if other is not None else {}
        both = [(before, after[one]) for one, *before in zip(suite.ids, suite.unsafe, suite.refused, strict=True) if one in after]
        prompts += len(both)
        changed += sum(tuple(before) != now for before, now in both)
    return prompts, changed


def sentence(found: Reproduction) -> str:
    """The outcome in one sentence, by how much included."""
    if not found.finished:
        return f"NOT REPRODUCED: the new run was stopped before its end; go on with: safebasin resume {found.output}"
    if found.same:
        return f"REPRODUCED: all {len(found.pairs)} measurements of {found.folder}, the untouched model's among them, are the same to the last prompt"
    both = [pair for pair in found.pairs if pair.there and pair.here]
    moved = max((abs(p.score_there - p.score_here) for p in both if p.score_there is not None and p.score_here is not None), default=0.0)
    verdicts, alone = sum(p.verdict_there != p.verdict_here for p in both), len(found.pairs) - len(both)
    answers = f"{sum(p.changed for p in both)} of {sum(p.prompts for p in both)} safety prompts were judged otherwise"
    told = f"{sum(p.same for p in both)} of {len(found.pairs)} measurements are the same; task scores differ by up to {moved:.3f}, {answers}, "
    told += f"{verdicts} verdict{'s' * (verdicts != 1)} changed"
    return f"NOT THE SAME: {told}" + (f"; {alone} configurations were tried in one run only" if alone else "")


def show(found: Reproduction, console: Console) -> None:
    """Print what differs, trial by trial where it does, and the sentence."""
    for one in found.made:
        screen.say(console, f"{one.what}: {one.there} there, {one.here} here", "yellow")
    odd = [pair for pair in found.pairs if not pair.same]
    if odd:
        table = screen.Grid("recipe", "seed", "trials", "score", "attack success", "verdict", "changed", box=None, padding=(0, 1), pad_edge=False)
        for pair in odd:
            ids = f"{pair.there or 'none'} > {pair.here or 'none'}"
            ends = [f"{_number(a)} > {_number(b)}" for a, b in ((pair.score_there, pair.score_here), (pair.asr_there, pair.asr_here))]
            verdict = "" if pair.verdict_there == pair.verdict_here is None else f"{pair.verdict_there or '-'} > {pair.verdict_here or '-'}"
            table.add_row(pair.recipe, str(pair.seed), ids, *ends, verdict, f"{pair.changed} of {pair.prompts}")
        screen.show(console, table)
    screen.say(console, sentence(found), "bold green" if found.same else "bold yellow")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
