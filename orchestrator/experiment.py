"""One experiment from end to end: checks, lanes, baseline, search, confirmation, handover, report."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import (
    baseline,
    checks,
    constraint,
    crash,
    handover,
    lanes,
    mirror,
    outputs,
    ownership,
    places,
    ranges,
    report,
    resuming,
    run_folder,
    screen,
    search,
    summary,
    tracking,
    trial_records,
)
from orchestrator.config import Experiment
from orchestrator.constraint import Judgement, Selection
from orchestrator.errors import SafebasinError
from orchestrator.evaluation import sequential
from orchestrator.progress import Dashboard, duration
from orchestrator.records import TrialResult, TrialSpec
from orchestrator.run_folder import prepare_folder
from orchestrator.searcher import Asked, Earlier

if TYPE_CHECKING:
    from rich.console import Console

Row = tuple[TrialResult, Judgement]

CONFIRMATION_ROUNDS = 3
"""How often the next finalists are taken where none of the earlier ones held on the further seeds."""


@dataclass
class Outcome:
    """What `run` leaves: 0 feasible, 3 nothing feasible, 1 stopped before the end, or nothing measured."""

    exit_code: int
    selection: Selection | None
    folder: Path
    sentence: str


@dataclass(frozen=True)
class Standing:
    """Whether this driver goes on with what another one began, and how."""

    resumed: bool
    retry_failed: bool = False
    """Whether it tries every failed trial again, those that failed by their own fault too."""
    run_id: str = ""


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

    def take_up(self, spaces: dict[str, Any]) -> None:
        """Read what an earlier driver finished in this folder. The baseline must be known."""
        found = trial_records.read(self.folder, self.experiment, spaces, self.standing.run_id, retry_failed=self.standing.retry_failed)
        for line in found.sentences:
            self.dashboard.say(line if line.startswith("warning") else f"warning: {line}")
        for result in found.results:
            self.specs[result.trial_id] = resuming.spec_of(self.experiment, result, self.folder, self.dump)
            judgement = self.judge(result)
            self.rows.append((result, judgement))
            self.dashboard.known(result, judgement)
            self.tracker.reconcile(self.specs[result.trial_id], result, judgement)
            handover.remove_checkpoint(result, self.folder, self.copy.remove)  # the earlier driver may have been killed before it could
        if self.standing.resumed:
            self.dashboard.say(f"resumed: {len(self.rows)} trials were finished before")
            outcomes = {r.trial_id: (r.state, j.task_score, j.values) for r, j in self.rows}
            past = found.past(outcomes, spaces)
            past += trial_records.unrecorded(self.folder, self.experiment, spaces, {one.trial_id for one in past})
            self.earlier = Earlier(past, found.next_id, lambda line: self.dashboard.say(line if line.startswith("warning") else f"warning: {line}"))
        outputs.write_trials_csv(self.folder / "trials.csv", [outputs.trial_row(r, j) for r, j in self.rows])

    def make_spec(self, asked: Asked) -> TrialSpec:
        """Spec of a suggested trial."""
        spec = search.build_spec(
            self.experiment, trial_id=asked.trial_id, recipe=asked.recipe, params=asked.params, seed=self.experiment.search.seeds[0],
            phase="search", folder=self.trial_folder(asked.trial_id), dump=self.dump,
        )  # fmt: skip
        spec = replace(spec, resumed=asked.resumed, untouched=sequential.untouched(self.experiment, self.baseline))
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
        if kind in ("lane_up", "lane_gone", "lane_added", "no_room", "machines"):
            self._lane(event)
        elif kind == "interrupted":
            why = f"{' and '.join(event['machines'])} left the cluster" if event.get("machines") else event.get("error") or "its worker died"
            again = event["deaths"] <= self.experiment.ray.max_trial_failures
            self.dashboard.say(f"{trial_id}: {why}{', it is taken up again' if again else ''}")
        elif kind == "finished":
            result = TrialResult.from_dict(event["result"])
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
        return constraint.judge(result, self.baseline, self.experiment.safety.limits)

    def tell(self, result: TrialResult) -> dict[str, Any]:
        """What the sampler learns of a trial."""
        judgement = self.judge(result)
        return {"score": judgement.task_score, "constraints": judgement.values}

    def finished(self, result: TrialResult) -> Judgement:
        """Judge a trial and write everything down before anything else happens."""
        self.localise(result)
        judgement = self.judge(result)
        outputs.write_json(self.folder / "trials" / result.trial_id / trial_records.RESULT, result.to_dict())
        self.rows[:] = [row for row in self.rows if row[0].trial_id != result.trial_id] + [(result, judgement)]
        outputs.write_trials_csv(self.folder / "trials.csv", [outputs.trial_row(r, j) for r, j in self.rows])
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


def run(
    experiment: Experiment,
    console: Console | None = None,
    stop: threading.Event | None = None,
    on_checked: Callable[[], None] = lambda: None,
    retry_failed: bool = False,
) -> Outcome:
    """Run the experiment. Raises SafebasinError for what the user can mend; an outcome without a feasible model is no error.

    Setting `stop` ends it cleanly from the moment `on_checked` is called, which is before anything is started or written. With
    `output.resume` a run that the folder holds is gone on with; `retry_failed` then tries every failed trial of it again.
    """
    console, stop = console or screen.console(), stop or threading.Event()
    folder = experiment.output_dir.absolute()
    if experiment.output_address is None:
        resumed = experiment.output.resume and resuming.interrupted(experiment, folder)
        checks.check_output(folder, experiment.output.overwrite and not resumed, resumed, places.inputs(experiment))
        checked = _checked(experiment, console, resumed)  # before anything is made: a folder that is refused stays as it is
        with ownership.active(folder, "run"), resuming.held(folder):
            return _run(experiment, folder, Standing(resumed, retry_failed), console, stop, on_checked, mirror.Folder(), checked)

    def say(line: str) -> None:
        screen.say(console, line, "bold yellow" if line.startswith("warning") else "", whole=True)

    checks.check_output(folder, False, True, kind="mirror")
    checked = _checked(experiment, console, experiment.output.resume and mirror.begun(experiment))
    with ownership.active(folder, "mirror"), resuming.held(folder), mirror.opened(experiment, stop, say) as copy:
        resumed = experiment.output.resume and resuming.interrupted(experiment, folder)
        try:
            outcome = _run(experiment, folder, Standing(resumed, retry_failed), console, stop, on_checked, copy, checked)
        except BaseException:
            trouble = copy.close()
            if trouble:
                say(f"warning: {trouble}")
            raise
        trouble = copy.close()
        return outcome if trouble is None else replace(outcome, exit_code=1, sentence=f"{outcome.sentence}; but {trouble}")


def _checked(experiment: Experiment, console: Console, resumed: bool) -> checks.Checked:
    """Everything that can be known without a cluster, said. Raises ConfigError (or a subclass), StorageError."""
    checked = checks.check(experiment, resumed=resumed)
    for line in checked.facts:
        screen.say(console, line)
    for line in checked.warnings:
        screen.say(console, f"warning: {line}", "bold yellow")
    return checked


def _run(
    experiment: Experiment, folder: Path, standing: Standing, console: Console, stop: threading.Event, on_checked: Callable[[], None],
    copy: mirror.Copy, checked: checks.Checked,
) -> Outcome:  # fmt: skip
    started = time.time()
    on_checked()
    if not standing.resumed:
        if experiment.output.overwrite:
            copy.empty()
        prepare_folder(experiment, folder)
    run_folder.claim_others(experiment, folder)
    copy.begin()
    facts = baseline.identity(experiment)

    def say(line: str) -> None:
        screen.say(console, line, "bold yellow" if line.startswith("warning") else "", whole=True)

    standing = replace(standing, run_id=resuming.identify(experiment, folder, facts, say, resumed=standing.resumed))
    tracker = tracking.open_tracker(experiment, folder, facts={f"{name}_hash": value for name, value in facts.items()})
    outcome: Outcome | None = None
    try:
        cluster = lanes.connect(experiment.ray)
        try:
            outcome = _with_cluster(experiment, folder, console, stop, tracker, cluster, checked, started, standing, copy)
        finally:
            lanes.shutdown(cluster)
    finally:
        tracker.close("FINISHED" if outcome and outcome.exit_code in (0, 3) else "KILLED" if stop.is_set() else "FAILED")
    return outcome


def _with_cluster(experiment, folder, console, stop, tracker, cluster, checked, started, standing, copy) -> Outcome:
    plan = lanes.plan(experiment, cluster.nodes, experiment.search.trials)
    if not cluster.started:  # for a cluster of this machine the checks have said it
        screen.say(console, plan.sentence)
    with Dashboard(console, experiment.search.trials, plan.lanes) as dashboard:
        dump = experiment.model_dump(mode="json")
        state = Run(experiment, folder, console, stop, tracker, dashboard, dump=dump, standing=standing, copy=copy, evidence=checked.evidence)
        group = lanes.Lanes()
        group.start(experiment, plan)
        try:
            _baseline(state, group)
            spaces = ranges.resolve_space(experiment, checked.num_layers)
            if state.baseline is not None:
                state.take_up(spaces)
            if not stop.is_set():
                search.run_search(
                    experiment, group, spaces=spaces, constraint_names=constraint.constraint_names(experiment), judge_result=state.tell,
                    make_spec=state.make_spec, on_event=state.event, stop_flag=stop, earlier=state.earlier,
                )  # fmt: skip
            _confirm(state, group)
        finally:
            group.stop()
    return _conclude(state, started)


def _baseline(state: Run, group) -> None:
    """The untouched model, measured once and cached by what it depends on."""
    where, own = baseline.path(state.experiment), state.folder / "baseline.json"
    result, trouble = None, None
    if state.standing.resumed:  # what finished trials were judged against
        result = baseline.recall(own, state.experiment, state.dashboard.say)
    if result is None:
        result, trouble = baseline.look_up(where, state.experiment, state.dashboard.say)
    if state.standing.resumed and result is not None:
        state.baseline = result
        result.facts |= state.evidence
        outputs.write_json(own, result.to_dict())
        state.tracker.know_baseline(result)
        return
    state.tracker.start_baseline()
    if result is None:
        state.dashboard.say("measuring the untouched model")
        spec = baseline.spec(state.experiment, state.folder)
        found = search.run_specs(group, [spec], state.event, state.stop)
        if not found or found[0].state == "stopped":
            return
        result = found[0]
        if result.state != "complete":
            trace = result.facts.get("traceback")
            raise SafebasinError(f"the untouched model could not be measured: {result.error}" + (f"; {crash.keep(trace)}" if trace else ""))
        trouble = baseline.remember(where, result) or trouble
    else:
        state.dashboard.say(f"untouched model: measured before, taken from {where}")
    if trouble:
        state.dashboard.say(f"warning: the cache that machines share: {trouble}")
    state.baseline = result
    result.facts |= state.evidence
    state.dashboard.running.pop(baseline.TRIAL_ID, None)
    outputs.write_json(state.folder / "baseline.json", result.to_dict())
    outputs.write_trials_csv(state.folder / "trials.csv", [])
    state.tracker.finish_baseline(result)
    rates = "  ".join(f"{s.name} {'ASR' if s.kind == 'harmful' else 'over-refusal'} {s.rate:.3f} (n={len(s.ids)})" for s in result.suites.values())
    state.dashboard.say(f"untouched model: {state.experiment.task.metric} {result.task.score:.3f}  {rates}")
    for line in summary.unbound(result, state.experiment):
        state.dashboard.say(f"warning: {line}")


def _confirm(state: Run, group) -> None:
    """Train the best configurations again, always asked in full, until one holds: on the further seeds, and on the first where that
    trial was stopped early."""
    first, *seeds = state.experiment.search.seeds
    for _ in range(CONFIRMATION_ROUNDS):
        chosen = constraint.finalists(state.rows, state.experiment.search.finalists, more_seeds=bool(seeds))
        if state.stop.is_set() or not chosen:
            return
        finished = {result.trial_id for result, _ in state.rows}
        wanted = [(found, seed) for found in chosen for seed in ([first] if found.screened else []) + seeds]
        specs = [spec for found, seed in wanted if (spec := _again(state, found, seed)).trial_id not in finished]
        if not specs:
            return
        state.dashboard.grow(len(specs))
        state.dashboard.say(f"confirming {len(chosen)} finalist(s) on seed(s) {', '.join(str(s) for s in sorted({s.seed for s in specs}))}")
        state.specs.update({spec.trial_id: spec for spec in specs})
        for spec in specs:
            trial_records.write_spec(state.folder, spec, state.standing.run_id)
        search.run_specs(group, specs, state.event, state.stop)
        if seeds and constraint.best(state.rows).best is not None:
            return


def _again(state: Run, found: constraint.Configuration, seed: int) -> TrialSpec:
    first = state.specs[found.trials[0][0].trial_id]
    trial_id = f"{first.trial_id}s{seed}"
    resumed, folder = state.standing.resumed, state.trial_folder(trial_id)
    return replace(first, trial_id=trial_id, seed=seed, phase="confirm", dir=folder, resumed=resumed, untouched={})


def _conclude(state: Run, started: float) -> Outcome:
    """Select, hand over, report; whatever finished is reported also after a stop."""
    if state.baseline is None:
        return Outcome(1, None, state.folder, "stopped before the untouched model was measured; nothing to report")
    selection = constraint.best(state.rows)
    if not state.stop.is_set():
        handover.remove_trained(state.folder, state.experiment.output.keep_models, state.copy.remove)
    facts = {"seconds": time.time() - started, "stopped": state.stop.is_set(), "hashes": baseline.identity(state.experiment)}
    card = report.model_card(state.experiment, state.baseline, selection)
    if state.experiment.output_address is not None:
        trouble = handover.fetch_winner(state.folder, selection, state.copy)
        if trouble:
            state.dashboard.say(f"warning: {trouble}")
    handover.write_best(state.folder, state.experiment, selection, state.specs, card)
    paths = report.write_report(state.folder, state.experiment, state.baseline, state.rows, selection, facts)
    state.tracker.finish(selection, [state.folder / "config.resolved.yaml", state.folder / "best.json", state.folder / "trials.csv", *paths])
    sentence = report.sentence(state.experiment, state.baseline, selection)
    if state.tracker.uri:
        screen.say(state.console, f"MLflow: {state.tracker.ui_hint()}", whole=True)
    if state.stop.is_set():
        return Outcome(1, selection, state.folder, f"stopped after {len(state.rows)} trials ({duration(facts['seconds'])}); {sentence}")
    return Outcome({"feasible": 0, "nothing feasible": 3}.get(selection.outcome, 1), selection, state.folder, sentence)
