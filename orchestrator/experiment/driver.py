"""One experiment from end to end: checks, lanes, baseline, search, confirmation, handover, report."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.config import Experiment
from orchestrator.decision import limits
from orchestrator.decision import selection as decision_selection
from orchestrator.decision.selection import Selection
from orchestrator.errors import SafebasinError
from orchestrator.evaluation import held_out
from orchestrator.experiment import baseline, checks, handover, mirror, places, resume, trial_records
from orchestrator.experiment import folder as run_folder
from orchestrator.experiment.folder import prepare_folder
from orchestrator.experiment.progress import Dashboard, duration
from orchestrator.experiment.state import Run, Standing, Start
from orchestrator.lanes import lanes
from orchestrator.records import TrialSpec
from orchestrator.report import alerts, table
from orchestrator.report import run as report
from orchestrator.search import spaces as ranges
from orchestrator.search import tune
from orchestrator.storage import disk_space, files, ownership
from orchestrator.terminal import crash, screen
from orchestrator.tracking import connect

if TYPE_CHECKING:
    from rich.console import Console

CONFIRMATION_ROUNDS = 3
"""How often the next finalists are taken where none of the earlier ones held on the further seeds."""


@dataclass
class Outcome:
    """What `run` leaves: 0 feasible, 3 nothing feasible, 1 stopped before the end, or nothing measured."""

    exit_code: int
    selection: Selection | None
    folder: Path
    sentence: str
    stopped: bool = False
    """Whether the user ended it before its end."""


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
        resumed = experiment.output.resume and resume.interrupted(experiment, folder)
        checks.check_output(folder, experiment.output.overwrite and not resumed, resumed, places.inputs(experiment))
        checked = _checked(experiment, console, resumed)  # before anything is made: a folder that is refused stays as it is
        with ownership.active(folder, "run"), resume.held(folder):
            return _run(Start(experiment, folder, console, stop, on_checked, checked, Standing(resumed, retry_failed), mirror.Folder()))

    say = functools.partial(_say, console)
    checks.check_output(folder, False, True, kind="mirror")
    checked = _checked(experiment, console, experiment.output.resume and mirror.begun(experiment))
    with ownership.active(folder, "mirror"), resume.held(folder), mirror.opened(experiment, stop, say) as copy:
        resumed = experiment.output.resume and resume.interrupted(experiment, folder)
        try:
            outcome = _run(Start(experiment, folder, console, stop, on_checked, checked, Standing(resumed, retry_failed), copy))
        except BaseException:
            trouble = copy.close()
            if trouble:
                say(f"warning: {trouble}")
            raise
        trouble = copy.close()
        return outcome if trouble is None else replace(outcome, exit_code=1, sentence=f"{outcome.sentence}; but {trouble}")


def _say(console: Console, line: str) -> None:
    screen.say(console, line, "bold yellow" if line.startswith("warning") else "", whole=True)


def _checked(experiment: Experiment, console: Console, resumed: bool) -> checks.Checked:
    """Everything that can be known without a cluster, said. Raises ConfigError (or a subclass), StorageError."""
    checked = checks.check(experiment, resumed=resumed)
    for line in checked.facts:
        screen.say(console, line)
    for line in checked.warnings:
        screen.say(console, f"warning: {line}", "bold yellow")
    return checked


def _run(start: Start) -> Outcome:
    experiment, folder, standing = start.experiment, start.folder, start.standing
    started = time.time()
    start.on_checked()
    if not standing.resumed:
        if experiment.output.overwrite:
            start.copy.empty()
        prepare_folder(experiment, folder)
    run_folder.claim_others(experiment, folder)
    start.copy.begin()
    facts = baseline.identity(experiment)
    run_id = resume.identify(experiment, folder, facts, functools.partial(_say, start.console), resumed=standing.resumed)
    start = replace(start, standing=replace(standing, run_id=run_id))
    tracker = connect.open_tracker(experiment, folder, facts={f"{name}_hash": value for name, value in facts.items()})
    outcome: Outcome | None = None
    try:
        cluster = lanes.connect(experiment.ray)
        try:
            outcome = _with_cluster(start, tracker, cluster, started)
        finally:
            lanes.shutdown(cluster)
    finally:
        tracker.close("FINISHED" if outcome and outcome.exit_code in (0, 3) else "KILLED" if start.stop.is_set() else "FAILED")
    return outcome


def _with_cluster(start: Start, tracker, cluster, started: float) -> Outcome:
    experiment, console, stop, checked = start.experiment, start.console, start.stop, start.checked
    plan = lanes.plan(experiment, cluster.nodes, experiment.search.trials)
    if not cluster.started:  # for a cluster of this machine the checks have said it
        screen.say(console, plan.sentence)
    with Dashboard(console, experiment.search.trials, plan.lanes) as dashboard, disk_space.patient(dashboard.say, stop.is_set):
        dump = experiment.model_dump(mode="json")
        known = {"standing": start.standing, "copy": start.copy, "evidence": checked.evidence}
        state = Run(experiment, start.folder, console, stop, tracker, dashboard, dump=dump, **known)
        group = lanes.Lanes()
        group.start(experiment, plan)
        try:
            _baseline(state, group)
            spaces = ranges.resolve_space(experiment, checked.num_layers)
            if state.baseline is not None:
                state.take_up(spaces)
            if not stop.is_set():
                tune.run_search(
                    experiment, group, spaces=spaces, constraint_names=limits.constraint_names(experiment), judge_result=state.tell,
                    make_spec=state.make_spec, on_event=state.event, stop_flag=stop, earlier=state.earlier,
                )  # fmt: skip
            _confirm(state, group)
        finally:
            group.stop()
    with disk_space.patient(functools.partial(_say, console), stop.is_set):
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
        files.write_json(own, result.to_dict())
        state.tracker.know_baseline(result)
        return
    state.tracker.start_baseline()
    if result is None:
        state.dashboard.say("measuring the untouched model")
        spec = baseline.spec(state.experiment, state.folder)
        found = tune.run_specs(group, [spec], state.event, state.stop)
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
    files.write_json(state.folder / "baseline.json", result.to_dict())
    table.write_trials_csv(state.folder / "trials.csv", [])
    state.tracker.finish_baseline(result)
    rates = "  ".join(f"{s.name} {'ASR' if s.kind == 'harmful' else 'over-refusal'} {s.rate:.3f} (n={len(s.ids)})" for s in result.suites.values())
    state.dashboard.say(f"untouched model: {state.experiment.task.metric} {result.task.score:.3f}  {rates}")
    for line in (*alerts.too_few(result, state.experiment), *alerts.unbound(result, state.experiment)):
        state.dashboard.say(f"warning: {line}")


def _confirm(state: Run, group) -> None:
    """Train the best configurations again, always asked in full, until one holds: on the further seeds, and on the first where that
    trial was stopped early.

    The plain control is trained again beside them where rows wait for it (`task.confirm_size`), so that the score that is reported has
    something to stand beside. What the search never asked ends no round: the next finalists are not chosen by it.

    Rounds are gone through from the first, with what earlier drivers of the run confirmed: a resumed run asks for no other trials than one that
    was never interrupted.
    """
    first, *seeds = state.experiment.search.seeds
    seen = [row for row in state.rows if row[0].phase != "confirm"]
    for _ in range(CONFIRMATION_ROUNDS):
        chosen = decision_selection.finalists(seen, state.experiment.search.finalists, more_seeds=bool(seeds))
        if state.stop.is_set() or not chosen:
            return
        wanted = [(found, seed) for found in chosen for seed in ([first] if found.screened else []) + seeds]
        specs = {spec.trial_id: spec for found, seed in wanted for spec in [_again(state, found, seed)]}
        if not specs.keys() - {result.trial_id for result, _ in seen}:
            return
        finished = {result.trial_id for result, _ in state.rows}
        missing = [spec for trial_id, spec in {**specs, **_control(state)}.items() if trial_id not in finished]
        if missing:
            state.dashboard.grow(len(missing))
            numbers = ", ".join(str(seed) for seed in sorted({spec.seed for spec in missing}))
            state.dashboard.say(f"confirming {len(chosen)} finalist(s) on seed(s) {numbers}")
            state.specs.update({spec.trial_id: spec for spec in missing})
            for spec in missing:
                trial_records.write_spec(state.folder, spec, state.standing.run_id)
            tune.run_specs(group, missing, state.event, state.stop)
        seen += [row for row in state.rows if row[0].trial_id in specs]
        if seeds and any(found.confirmed and found.holds for found in decision_selection.configurations(seen)):
            return


def _control(state: Run) -> dict[str, TrialSpec]:
    """The trial that scores plain fine-tuning on the rows held out of the search, by its id; none where none are."""
    if state.baseline is None or state.baseline.confirmation is None:
        return {}
    searched = [row for row in state.rows if row[0].phase == "search"]
    found = decision_selection.control(searched, held_out.plain_recipes(state.experiment))
    specs = [] if found is None else [_again(state, found, state.experiment.search.seeds[1])]
    return {spec.trial_id: spec for spec in specs}


def _again(state: Run, found: decision_selection.Configuration, seed: int) -> TrialSpec:
    first = state.specs[found.trials[0][0].trial_id]
    trial_id = f"{first.trial_id}s{seed}"
    resumed, folder = state.standing.resumed, state.trial_folder(trial_id)
    return replace(first, trial_id=trial_id, seed=seed, phase="confirm", dir=folder, resumed=resumed, untouched={}, early_end=False)


def _conclude(state: Run, started: float) -> Outcome:
    """Select, hand over, report; whatever finished is reported also after a stop."""
    if state.baseline is None:
        return Outcome(1, None, state.folder, "stopped before the untouched model was measured; nothing to report", stopped=True)
    selection = decision_selection.best(state.rows)
    if not state.stop.is_set():
        handover.remove_trained(state.folder, state.experiment.output.keep_models, state.copy.remove)
    facts = {"seconds": time.time() - started, "stopped": state.stop.is_set(), "hashes": baseline.identity(state.experiment),
             "left_out": state.left_out}  # fmt: skip
    card = report.model_card(state.experiment, state.baseline, selection)
    if state.experiment.output_address is not None:
        trouble = handover.fetch_winner(state.folder, selection, state.copy)
        if trouble:
            state.dashboard.say(f"warning: {trouble}")
    waited = len(state.baseline.confirmation.ids) if state.baseline.confirmation is not None else 0
    handover.write_best(state.folder, state.experiment, selection, state.specs, card, waited)
    paths = report.write_report(state.folder, state.experiment, state.baseline, state.rows, selection, facts)
    files_of_it = [state.folder / "config.resolved.yaml", state.folder / "best.json", state.folder / "trials.csv", *paths]
    state.tracker.finish(selection, files_of_it, stopped=facts["stopped"])
    sentence = report.sentence(state.experiment, state.baseline, selection, stopped=facts["stopped"])
    if state.tracker.uri:
        screen.say(state.console, f"MLflow: {state.tracker.ui_hint()}", whole=True)
    if facts["stopped"]:
        done = sum(result.phase == "search" and result.final for result, _ in state.rows)
        told = f"stopped after {done} of {state.experiment.search.trials} trials ({duration(facts['seconds'])}): {sentence}"
        return Outcome(1, selection, state.folder, told, stopped=True)
    return Outcome({"feasible": 0, "nothing feasible": 3}.get(selection.outcome, 1), selection, state.folder, sentence)
