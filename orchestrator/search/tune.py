"""The search: Ray Tune asks our studies for trials, the lanes run them, and the studies are told score and constraints.

Tune runs a light trial per suggestion that only waits for the broker's answer: it holds no CPU, sits on the driver's machine and
its process is used again, so a trial costs milliseconds beyond its own work. The searcher asks one trial per lane ahead of Tune,
which waits in the broker's queue, so a lane never idles and Tune needs no more processes than there are lanes. Lanes come and go with
the machines; how many trials run at a time follows.

Tune runs in a thread; the caller's thread (the main one) takes events, looks at the stop flag and the clock.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray import tune
from ray.tune.execution import class_cache
from ray.tune.search import Searcher

from orchestrator.config import Experiment, recipe_items
from orchestrator.errors import LaneError
from orchestrator.lanes.lanes import Lanes
from orchestrator.records import Phase, TrialResult, TrialSpec
from orchestrator.search.spaces import RecipeSpace
from orchestrator.search.studies import Asked, Earlier, Studies

log = logging.getLogger(__name__)

Judge = Callable[[TrialResult], Mapping[str, Any]]
"""TrialResult -> {"score": float | None, "constraints": {name: value, <= 0 is feasible}}"""

OnEvent = Callable[[dict[str, Any]], None]

MOST_IN_TUNE = 1000
"""Above any number of lanes."""

TICK_S = 0.2
"""How often the stop flag and the clock are looked at while no event comes."""


def build_spec(
    experiment: Experiment, *, trial_id: str, recipe: str, params: dict[str, Any], seed: int, phase: Phase, folder: str, dump: dict | None = None
) -> TrialSpec:
    """Spec of a trial from flat parameters: `lora.lora_r` goes to that strategy's knobs, a bare name to `training`.

    `recipe` "" (the baseline) has no strategies. `dump` is `experiment.model_dump(mode="json")`, where it is at hand.
    """
    items = []
    if recipe:
        chosen = experiment.recipes[experiment.recipe_names.index(recipe)]
        for name, pinned in recipe_items(chosen):
            sampled = {key.partition(".")[2]: value for key, value in params.items() if key.partition(".")[0] == name and "." in key}
            items.append((name, {**pinned, **sampled}))
    training = {key: value for key, value in params.items() if "." not in key}
    dump = dump if dump is not None else experiment.model_dump(mode="json")
    return TrialSpec(trial_id, recipe, tuple(items), training, dict(params), seed, phase, dump, folder)


def lane_trial_class() -> type[tune.Trainable]:
    """What Tune runs: waits until the broker has the trial's result. One step, no CPU.

    Made in a function so that it travels by value: its process then imports neither Optuna nor this package.
    """

    class LaneTrial(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self._ours = config["trial_id"]
            self._broker = ray.get_actor(config["broker"])
            ray.get(self._broker.attend.remote(fresh=True))

        def step(self) -> dict[str, Any]:
            while (result := ray.get(self._broker.wait.remote(self._ours))) is None:
                continue
            ray.get(self._broker.meet.remote())
            return {"state": result["state"], "done": True}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self._ours = new_config["trial_id"]
            ray.get(self._broker.attend.remote(fresh=False))
            return True

    return LaneTrial


class BasinSearch(Searcher):
    """Tune's view of `Studies`: suggests and submits, judges and tells. Errors are raised, never logged away."""

    def __init__(self, studies: Studies, lanes: Lanes, make_spec: Callable[[Asked], TrialSpec], judge_result: Judge, most: int | None):
        super().__init__()
        self._studies, self._lanes, self._make_spec, self._judge = studies, lanes, make_spec, judge_result
        self._ids: dict[str, str] = {}
        self._ahead: deque[str] = deque()
        self._most = most
        self._expected = 0
        self._left = False
        """Whether a trial has ended since the last one was handed out: its process waits for a successor."""
        self._said: set[str] = set()
        self.asked: list[str] = []
        self.closed = threading.Event()
        """Set: nothing more is asked."""
        self.finished = threading.Event()
        """Set when every trial was told and nothing more will come."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher into the experiment folder; ours holds threads and actors, and is rebuilt by `run_search`."""
        return {"asked": self.asked}

    def _follow(self) -> tuple[int, int]:
        """(trials Tune may know at a time, trials to ask for beyond them), by the lanes there are now; the broker is told of a change."""
        lanes = max(1, self._lanes.count)
        at_once = min(self._most or 2 * lanes, 2 * lanes)
        in_tune = min(at_once, lanes)
        if self._expected != in_tune or (self._left and len(self._ids) >= in_tune):
            self._expected, self._left = in_tune, False
            self._lanes.expect(in_tune)
        return in_tune, at_once - in_tune

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The oldest trial that Tune does not know yet, None while there are as many as lanes; asks for more that wait in the lanes' queue."""
        in_tune, ahead = self._follow()
        if len(self._ids) >= in_tune:
            return None
        while len(self._ahead) <= ahead and not self.closed.is_set() and not self._lanes.broken:
            asked = self._studies.ask()
            if asked is None:
                self.closed.set()
                break
            self.asked.append(asked.trial_id)
            self._ahead.append(asked.trial_id)
            self._lanes.submit(self._make_spec(asked))
            if self.closed.is_set():  # between looking and submitting: whoever closed it may have missed this one
                self._lanes.cancel(asked.trial_id)
        if not self._ahead:
            self._lanes.expect(0)
            self._check_finished()
            return Searcher.FINISHED
        self._left = False
        self._ids[trial_id] = self._ahead.popleft()
        return {"trial_id": self._ids[trial_id], "broker": self._lanes.broker_name}

    def news(self) -> list[dict[str, Any]]:
        """Events of recipes that are not asked any more, each once."""
        fresh = {recipe: sentence for recipe, sentence in self._studies.notes.items() if recipe not in self._said}
        self._said |= fresh.keys()
        return [{"kind": "left_out", "recipe": recipe, "sentence": sentence} for recipe, sentence in fresh.items()]

    def _check_finished(self) -> None:
        if not self._ids and not self._ahead and (self.closed.is_set() or self._lanes.broken):
            self.finished.set()

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        ours, self._left = self._ids.pop(trial_id), True
        # The event that carries the result travels beside Tune's own answer and may be a moment behind it.
        found = self._lanes.wait(ours, timeout=0.0 if error else 30.0)
        if found is None:
            log.error("Ray Tune lost the trial that waited for %s; it is told failed", ours)
            self._studies.tell(ours, "failed")
        else:
            state = "cancelled" if found.facts.get("cancelled") else found.state
            judged = self._judge(found) if state in ("complete", "stopped") else {}
            self._studies.tell(ours, state, judged.get("score"), judged.get("constraints"))
        self._check_finished()

    def save(self, checkpoint_path: str) -> None:
        """Tune's own copy of our state is a marker: the trial records hold the search."""
        with open(checkpoint_path, "w") as file:
            file.write("see trials/\n")

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("an interrupted search goes on through Studies.restore, not through Tuner.restore")


def run_search(
    experiment: Experiment,
    lanes: Lanes,
    *,
    spaces: dict[str, RecipeSpace],
    constraint_names: Sequence[str],
    judge_result: Judge,
    make_spec: Callable[[Asked], TrialSpec],
    on_event: OnEvent | None = None,
    stop_flag: threading.Event | None = None,
    earlier: Earlier | None = None,
    stop_grace_s: float = 30.0,
) -> list[TrialResult]:
    """Search until the budget, the time budget or the user ends it; results of every trial that started, in order.

    `on_event` is called in this thread with every event (`Lanes.next_event`). With `stop_flag` set no trial starts, queued ones
    are dropped and running ones are asked to stop; after `stop_grace_s` their processes are ended. Raises LaneError where every
    lane is gone (its `results` holds what finished), and whatever the judge or Optuna raise. `earlier` (not None): go on with that
    search; see `Studies.restore`.
    """
    if earlier is None:
        studies = Studies.create(experiment, spaces, constraint_names)
    else:
        studies = Studies.restore(experiment, spaces, constraint_names, earlier)
    search = BasinSearch(studies, lanes, make_spec, judge_result, experiment.search.max_concurrent_trials)
    tuner = _tuner(experiment, search)
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            tuner.fit()
        except BaseException as error:  # handed to the caller's thread, which raises it
            failure.append(error)
        finally:
            search.finished.set()

    thread = threading.Thread(target=fit, name="safebasin-tune", daemon=True)
    lanes.helpers.append(thread)
    thread.start()
    watch = _Watch(lanes, search, stop_flag, experiment.search.time_budget_s, stop_grace_s)
    try:
        # Tune's own end (5-10 s of waiting for its processes) goes on in its thread; `Lanes.stop` waits for that.
        _drain(lanes, on_event, lambda: not search.finished.is_set() and not lanes.dead, watch)
        for news in search.news() if on_event is not None else []:
            on_event(news)
    finally:
        if not search.finished.is_set():  # on_event raised, a second Ctrl-C, or the cluster died: nothing may be left running
            search.closed.set()
            lanes.stop(grace_s=0.0)
            thread.join(1.0 if lanes.dead else 30.0)
    if failure and not lanes.broken:
        raise failure[0]
    results = [result for trial in search.asked if (result := lanes.wait(trial, 0.0)) is not None and result.facts.get("started", True)]
    if lanes.broken and not watch.killed:
        error = LaneError(lanes.broken)
        error.results = results
        raise error
    return results


def run_specs(
    lanes: Lanes,
    specs: Sequence[TrialSpec],
    on_event: OnEvent | None = None,
    stop_flag: threading.Event | None = None,
    *,
    stop_grace_s: float = 30.0,
) -> list[TrialResult]:
    """Run given specs (the baseline, finalists on further seeds); results in the order of `specs`, without those never started.

    Stopping is as in `run_search`. Raises LaneError where every lane is gone.
    """
    for spec in specs:
        lanes.submit(spec)
    watch = _Watch(lanes, None, stop_flag, None, stop_grace_s)
    _drain(lanes, on_event, lambda: any(lanes.wait(spec.trial_id, 0.0) is None for spec in specs), watch)
    results = [lanes.wait(spec.trial_id, 0.0) for spec in specs]
    results = [result for result in results if result.facts.get("started", True)]
    if lanes.broken and not watch.killed:
        error = LaneError(lanes.broken)
        error.results = results
        raise error
    return results


class _Watch:
    """Looks at the stop flag and the clock: first no new trials, then running ones are asked, then processes are ended."""

    def __init__(self, lanes: Lanes, search: BasinSearch | None, flag: threading.Event | None, budget_s: float | None, grace_s: float):
        self._lanes, self._search, self._flag, self._grace_s = lanes, search, flag, grace_s
        self._deadline = None if budget_s is None else time.monotonic() + budget_s
        self._kill_at: float | None = None
        self.killed = False

    def news(self) -> list[dict[str, Any]]:
        return self._search.news() if self._search is not None else []

    def look(self) -> None:
        now = time.monotonic()
        if self._deadline is not None and now > self._deadline:
            self._deadline = None
            self._close()
            self._lanes.cancel_all(running=False)
        if self._flag is not None and self._flag.is_set() and self._kill_at is None:
            self._kill_at = now + self._grace_s
            self._close()
            self._lanes.cancel_all()
        if self._kill_at is not None and now > self._kill_at and not self.killed:
            self.killed = True
            self._lanes.stop(grace_s=0.0)

    def _close(self) -> None:
        if self._search is not None:
            self._search.closed.set()


def _drain(lanes: Lanes, on_event: OnEvent | None, alive: Callable[[], bool], watch: _Watch) -> None:
    """Pass events on until `alive` says no and none is left."""
    while True:
        running = alive()
        event = lanes.next_event(timeout=TICK_S if running else 0.0)
        for one in watch.news() if on_event is not None else []:
            on_event(one)
        if event is not None and on_event is not None:
            on_event(event)
        if event is None and not running:
            return
        watch.look()


def _tuner(experiment: Experiment, search: BasinSearch) -> tune.Tuner:
    quiet = {
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals are the caller's
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files per trial
        "RAY_AIR_NEW_OUTPUT": "0",  # the new reporter prints even at verbose=0
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    # Tune's copy of its own state is never read, and a disk that is full is said by us: not a traceback each time it cannot be written
    for name in ("ray.tune.execution.experiment_state", "ray.train._internal.syncer"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Tune would copy them from the environment into its actors' runtime env, which Ray writes into its logs. Our trials only wait on the broker.
    class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    # A sliver of the resource every machine has under its own address: always fits beside lanes that hold every CPU. The label
    # keeps the waiting trials on the driver's machine, also where several share an address.
    place = {f"node:{ray.util.get_node_ip_address()}": 0.001}
    here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    return tune.Tuner(
        tune.with_resources(lane_trial_class(), tune.PlacementGroupFactory([place], bundle_label_selector=[here])),
        tune_config=tune.TuneConfig(
            # how many run at a time is the searcher's to say; Tune only learns that it may start several processes at once
            search_alg=search, num_samples=-1, max_concurrent_trials=MOST_IN_TUNE, reuse_actors=True, trial_dirname_creator=_folder
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=str((experiment.output_dir / "ray").resolve()),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )


def _folder(trial) -> str:
    return trial.config["trial_id"]
