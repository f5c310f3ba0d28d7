"""The driver's state while an experiment runs: what it begins with, its trials so far, and what it does with each event."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.config import Experiment
from orchestrator.decision import limits
from orchestrator.decision.limits import Judgement
from orchestrator.evaluation import held_out, sequential
from orchestrator.experiment import baseline, checks, handover, mirror, resume, trial_records
from orchestrator.experiment.progress import Dashboard
from orchestrator.records import TrialResult, TrialSpec
from orchestrator.report import table
from orchestrator.search import tune
from orchestrator.search.studies import Asked, Earlier
from orchestrator.storage import files, layout, ownership

if TYPE_CHECKING:
    from rich.console import Console

Row = tuple[TrialResult, Judgement]


@dataclass(frozen=True)
class Standing:
    """Whether this driver goes on with what another one began, and how."""

    resumed: bool
    retry_failed: bool = False
    """Whether it tries every failed trial again, those that failed by their own fault too."""
    run_id: str = ""


@dataclass(frozen=True)
class Start:
    """What a driver begins with."""

    experiment: Experiment
    folder: Path
    console: Console
    stop: threading.Event
    on_checked: Callable[[], None]
    checked: checks.Checked
    standing: Standing
    copy: mirror.Copy


@dataclass
class Run:
    """State of a running experiment; the driver's only."""

    experiment: Experiment
    folder: Path
    console: Console
    stop: threading.Event
    tracker: Any
    dashboard: Dashboard
    baseline: TrialResult | None = None
    dump: dict[str, Any] = field(default_factory=dict)
    """The experiment as trials carry it."""
    rows: list[Row] = field(default_factory=list)
    specs: dict[str, TrialSpec] = field(default_factory=dict)
    copy: mirror.Copy = field(default_factory=mirror.Folder)
    """The output folder's other half, where `output.dir` is an address."""
    standing: Standing = Standing(False)
    evidence: dict[str, Any] = field(default_factory=dict)
    """What the checks found of overlaps and of rows that do not fit; kept with the untouched model's record, which every verdict is taken against."""
    earlier: Earlier | None = None
    """The search of an earlier driver; None for a new one."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Recipe -> why the search stopped asking it (`search.allocation: adaptive`)."""

    def take_up(self, spaces: dict[str, Any]) -> None:
        """Read what an earlier driver finished in this folder. The baseline must be known."""
        found = trial_records.read(self.folder, self.experiment, spaces, self.standing.run_id, retry_failed=self.standing.retry_failed)
        for line in found.sentences:
            self.warn(line)
        for result in found.results:
            self.specs[result.trial_id] = resume.spec_of(self.experiment, result, self.folder, self.dump)
            judgement = self.judge(result)
            self.rows.append((result, judgement))
            self.dashboard.known(result, judgement)
            self.tracker.reconcile(self.specs[result.trial_id], result, judgement)
            handover.remove_checkpoint(result, self.folder, self.copy.remove)  # the earlier driver may have been killed before it could
        if self.standing.resumed:
            self.dashboard.say(f"resumed: {len(self.rows)} trials were finished before")
            told = {result.trial_id: (result.state, self.tell(result)) for result, _ in self.rows}
            outcomes = {trial_id: (state, learnt["score"], learnt["constraints"]) for trial_id, (state, learnt) in told.items()}
            past = found.past(outcomes, spaces)
            past += trial_records.unrecorded(self.folder, self.experiment, spaces, {one.trial_id for one in past})
            self.earlier = Earlier(past, found.next_id, self.warn)
        table.write_trials_csv(self.folder / "trials.csv", [table.trial_row(r, j) for r, j in self.rows])

    def warn(self, line: str) -> None:
        self.dashboard.say(line if line.startswith("warning") else f"warning: {line}")

    def make_spec(self, asked: Asked) -> TrialSpec:
        """Spec of a suggested trial."""
        seed = self.experiment.search.seeds[0] if asked.seed is None else asked.seed
        spec = tune.build_spec(
            self.experiment, trial_id=asked.trial_id, recipe=asked.recipe, params=asked.params, seed=seed, phase="search",
            folder=self.trial_folder(asked.trial_id), dump=self.dump,
        )  # fmt: skip
        untouched = sequential.untouched(self.experiment, self.baseline)
        spec = replace(spec, resumed=asked.resumed, untouched=untouched, early_end=asked.early_end)
        trial_records.write_spec(self.folder, spec, self.standing.run_id, asked)
        self.specs[spec.trial_id] = spec
        return spec

    def trial_folder(self, trial_id: str) -> str:
        ownership.claim(self.folder / "trials" / trial_id, folder=True)
        return str(self.folder / "trials" / trial_id)

    def event(self, event: dict[str, Any]) -> None:
        """One event of the lanes: to the screen, to MLflow, and a finished trial into the books."""
        kind, trial_id = event["kind"], event.get("trial_id")
        if event.get("storage"):
            self.dashboard.say(f"warning: {trial_id}: {event['storage']}")
        if kind == "left_out":
            self.left_out[event["recipe"]] = event["sentence"]
            self.dashboard.say(event["sentence"])
        elif kind in ("lane_up", "lane_gone", "lane_added", "no_room", "machines"):
            self._lane(event)
        elif kind == "interrupted":
            why = f"{' and '.join(event['machines'])} left the cluster" if event.get("machines") else event.get("error") or "its worker died"
            again = event["deaths"] <= self.experiment.ray.max_trial_failures
            self.dashboard.say(f"{trial_id}: {why}{', it is taken up again' if again else ''}")
        elif kind == "finished":
            result: TrialResult = event["result"]
            if result.phase != "baseline" and result.facts.get("started", True):
                self.finished(result)
        else:
            recipe = self.specs[trial_id].recipe if trial_id in self.specs else "untouched model"
            self.dashboard.event(trial_id, {"recipe": recipe, **event})
            if trial_id != baseline.TRIAL_ID:
                if kind == "started":
                    self.tracker.start_trial(self.specs[trial_id])
                else:
                    self.tracker.event(trial_id, event)

    def _lane(self, event: dict[str, Any]) -> None:
        if event["kind"] == "lane_up":
            self.dashboard.say(f"lane {event['lane']} is up on {event['host']}")
        elif "sentence" in event:
            self.dashboard.lanes = event.get("lanes", self.dashboard.lanes)
            self.dashboard.say(event["sentence"])
        elif not self.stop.is_set():
            self.dashboard.lanes = max(1, self.dashboard.lanes - 1)
            self.dashboard.say(f"lane {event['lane']} is gone: {event['error']}")

    def judge(self, result: TrialResult) -> Judgement:
        return limits.judge(result, self.baseline, self.experiment.safety.limits, held_out.looks(self.experiment))

    def tell(self, result: TrialResult) -> dict[str, Any]:
        """What the sampler learns of a trial: of one that ended early how far its probes were beyond the limit."""
        judgement = self.judge(result)
        told = limits.extrapolated(result, judgement) if result.state == "stopped" else judgement.values
        return {"score": judgement.task_score, "constraints": told}

    def finished(self, result: TrialResult) -> Judgement:
        """Judge a trial and write everything down before anything else happens."""
        self.localise(result)
        judgement = self.judge(result)
        files.write_json(self.folder / "trials" / result.trial_id / layout.RESULT, result.to_dict())
        self.rows[:] = [row for row in self.rows if row[0].trial_id != result.trial_id] + [(result, judgement)]
        table.write_trials_csv(self.folder / "trials.csv", [table.trial_row(r, j) for r, j in self.rows])
        if result.final:  # what a stop or a machine cut short goes on from its checkpoint
            handover.remove_checkpoint(result, self.folder, self.copy.remove)
        handover.prune_models(self.rows, self.experiment.output.keep_models, self.copy.remove)
        self.tracker.finish_trial(result, judgement)
        self.dashboard.finished(result, judgement)
        for trouble in result.facts.get("storage", []):
            self.dashboard.say(f"warning: {result.trial_id}: {trouble}")
        self.copy.news()
        return judgement

    def localise(self, result: TrialResult) -> None:
        """Where `output.dir` is an address, a trial's model is named by its place in this machine's copy, whether or not it is there yet."""
        if result.model_dir and self.experiment.output_address is not None:
            result.model_dir = str(Path(self.trial_folder(result.trial_id)) / "model")
