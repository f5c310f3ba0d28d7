"""A search is rebuilt from the trial records, whatever became of the journal: same trials, same next proposal, no id twice."""

from __future__ import annotations

import json
import logging
import shutil
import warnings

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from orchestrator import config
from orchestrator.errors import ConfigError
from orchestrator.experiment import identity, trial_records
from orchestrator.records import TrialResult
from orchestrator.search import journal
from orchestrator.search.spaces import RecipeSpace
from orchestrator.search.studies import SAMPLERS, Earlier, Studies, open_storage
from orchestrator.search.tune import build_spec
from orchestrator.storage import files, layout

NAMES = ("harmful",)
SPACES = {
    "full": RecipeSpace("full", {"learning_rate": FloatDistribution(1e-4, 1e-2, log=True)}, {}, {"learning_rate": 1e-3}),
    "lora": RecipeSpace(
        "lora", {"lora.lora_r": CategoricalDistribution([2, 4]), "lora.lora_alpha": IntDistribution(1, 3)}, {"learning_rate": 1e-3}, {}
    ),
}  # fmt: skip
RUN = "run-1"
EVERY = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def experiment(where, trials=9, sampler="random", **search):
    recipes = [["full"], ["lora"]]
    return config.from_dict({
        "recipes": recipes, "search": {"trials": trials, "sampler": sampler, **search}, "output": {"dir": str(where)},
    })  # fmt: skip


def outcome(asked):
    value = asked.params["learning_rate"] * (asked.params.get("lora.lora_r", 1) + asked.params.get("lora.lora_alpha", 0))
    return "complete", value, {"harmful": value - 0.01}


class Driver:
    """Asks, records and tells as `experiment` does, without lanes."""

    def __init__(self, made, studies):
        self.made, self.folder, self.studies, self.dump = made, made.output_dir, studies, made.model_dump(mode="json")

    @classmethod
    def begin(cls, where, **kwargs):
        made = experiment(where, **kwargs)
        return cls(made, Studies.create(made, SPACES, NAMES))

    @classmethod
    def resume(cls, where, say=lambda line: None, **kwargs):
        made = experiment(where, **kwargs)
        found = trial_records.read(made.output_dir, made, SPACES, RUN)
        outcomes = {r.trial_id: (r.state, r.task.score if r.task else None, {"harmful": r.facts["harmful"]}) for r in found.results}
        driver = cls(made, Studies.restore(made, SPACES, NAMES, Earlier(found.past(outcomes, SPACES), found.next_id, say)))
        driver.found = found
        return driver

    def ask(self):
        asked = self.studies.ask()
        if asked is not None and not asked.resumed:
            folder = str(self.folder / "trials" / asked.trial_id)
            spec = build_spec(self.made, trial_id=asked.trial_id, recipe=asked.recipe, params=asked.params, seed=0, phase="search",
                              folder=folder, dump=self.dump)  # fmt: skip
            trial_records.write_spec(self.folder, spec, RUN, asked)
        return asked

    def end(self, asked, **changes):
        state, score, values = outcome(asked)
        task = {"metric": self.made.task.metric, "score": score, "scores": [score], "ids": ["a"]}
        result = TrialResult(asked.trial_id, asked.recipe, dict(asked.params), 0, "search", state, facts={"harmful": values["harmful"]})
        files.write_json(self.folder / "trials" / asked.trial_id / "result.json", {**result.to_dict(), "task": task, **changes})
        self.studies.tell(asked.trial_id, state, score, values)

    def rest(self):
        found = []
        while (asked := self.ask()) is not None:
            found.append((asked.trial_id, asked.recipe, json.dumps(asked.params, sort_keys=True)))
            self.end(asked)
        return found

    def told(self):
        """Of every trial that ran: (id, state, value, constraints), recipe by recipe."""
        return [
            (t.user_attrs["trial_id"], t.state, t.value, t.constraints, t.params)
            for trials in self.studies.trials.values() for t in trials if "trial_id" in t.user_attrs
        ]  # fmt: skip


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A folder with five finished trials and one that was asked, and what an undisturbed search does afterwards."""
    where = tmp_path_factory.mktemp("interrupted") / "out"
    driver = Driver.begin(where)
    for _ in range(5):
        driver.end(driver.ask())
    running = driver.ask()
    shutil.copytree(where, where.with_name("kept"))
    driver.end(running)
    return where.with_name("kept"), running, driver.rest(), driver.told()


def same_end(folder, running, rest, told, say=lambda line: None):
    driver = Driver.resume(folder, say)
    asked = driver.ask()
    assert (asked.trial_id, asked.params, asked.resumed) == (running.trial_id, running.params, True), "what was interrupted comes first"
    driver.end(asked)
    assert driver.rest() == rest and driver.told() == told


STOPS = [(sampler, stop) for sampler in (*SAMPLERS, "joint") for stop in (1, 4, 9) if sampler != "gp"] + [("gp", 4)]


@pytest.mark.parametrize(("sampler", "stop"), STOPS)
def test_a_resumed_search_goes_on_as_an_undisturbed_one_with_every_sampler(tmp_path, sampler, stop):
    """The journal is gone; small spaces, so that points known are proposed again."""
    trials = 6 if sampler == "gp" else 12
    straight = Driver.begin(tmp_path / "straight", trials=trials, sampler=sampler)
    broken = Driver.begin(tmp_path / "broken", trials=trials, sampler=sampler)
    for _ in range(stop):
        straight.end(straight.ask())
        broken.end(broken.ask())
    lost = broken.ask()
    (tmp_path / "broken" / "study.journal").unlink()
    again = Driver.resume(tmp_path / "broken", trials=trials, sampler=sampler)
    first = again.ask()
    assert first.trial_id == lost.trial_id and first.params == lost.params and first.resumed
    again.end(first)
    straight.end(straight.ask())
    assert again.rest() == straight.rest() and again.told() == straight.told()


JOURNALS = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-17]),
    "zeros": lambda path: path.write_bytes(path.read_bytes()[:-300] + b"\0" * 300),
    "first line gone": lambda path: path.write_bytes(path.read_bytes().split(b"\n", 1)[1]),
    "a study missing": lambda path: path.write_bytes(b"".join(line for line in path.read_bytes().splitlines(True) if b'"op_code":0' not in line)),
    "a middle line of text": lambda path: path.write_bytes(path.read_bytes().replace(b"\n", b"\nnot json at all\n", 3)),
    "numbers": lambda path: path.write_bytes(b"1\n2\n[]\n"),
    "foreign": lambda path: path.write_bytes(b"%PDF-1.7 something else\n"),
    "a folder": lambda path: (path.unlink(), path.mkdir(), (path / "x").write_text("kept")),
}


@pytest.mark.parametrize("damage", JOURNALS)
def test_no_state_of_the_journal_stops_or_changes_a_resume(tmp_path, interrupted, damage):
    folder, *rest = interrupted
    shutil.copytree(folder, tmp_path / "out")
    path = tmp_path / "out" / "study.journal"
    JOURNALS[damage](path)
    before = path.read_bytes() if path.is_file() else None
    said = []
    same_end(tmp_path / "out", *rest, said.append)
    asides = list((tmp_path / "out").glob("study.journal.damaged-*"))
    if damage in ("missing", "empty"):
        assert not asides and len(said) == 1 and "gone or empty" in said[0]
    else:
        assert len(asides) == len(said) == 1 and asides[0].name in said[0] and "rebuilt from the trial records" in said[0]
        assert before is None or asides[0].read_bytes() == before, "moved aside as it was"
    storage = open_storage(experiment(tmp_path / "out"))
    found = [t for s in optuna.get_all_study_summaries(storage) for t in optuna.load_study(study_name=s.study_name, storage=storage).trials]
    assert sum(t.state == TrialState.COMPLETE and "trial_id" in t.user_attrs for t in found) == 9, "the journal is whole again"


@EVERY
@given(data=st.data())
def test_a_journal_cut_flipped_or_missing_lines_anywhere_changes_nothing(tmp_path_factory, interrupted, data):
    folder, *rest = interrupted
    where = tmp_path_factory.mktemp("any") / "out"
    shutil.copytree(folder, where)
    path = where / "study.journal"
    raw = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "flip", "drop"]))
    place = data.draw(st.integers(0, len(raw) - 1))
    if kind == "cut":
        raw = raw[:place]
    elif kind == "flip":
        raw[place] ^= data.draw(st.integers(1, 255))
    else:
        lines = bytes(raw).split(b"\n")
        gone = data.draw(st.sets(st.integers(0, len(lines) - 1), min_size=1))
        raw = b"\n".join(line for i, line in enumerate(lines) if i not in gone)
    path.write_bytes(bytes(raw))
    same_end(where, *rest)


def test_other_studies_in_a_shared_journal_are_kept(tmp_path, interrupted):
    folder, running, rest, told = interrupted
    shutil.copytree(folder, tmp_path / "out")
    storage = open_storage(experiment(tmp_path / "out"))
    optuna.create_study(study_name="someone/else", storage=storage).add_trial(optuna.trial.create_trial(value=1.0))
    same_end(tmp_path / "out", running, rest, told)
    kept = optuna.load_study(study_name="someone/else", storage=open_storage(experiment(tmp_path / "out")))
    assert [t.value for t in kept.trials] == [1.0] and not list((tmp_path / "out").glob("*.damaged-*"))


def test_a_named_storage_that_is_no_journal_is_left_alone(tmp_path, interrupted):
    folder, running, *_ = interrupted
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "thesis.txt").write_text("years of work\n")
    said = []
    driver = Driver.resume(tmp_path / "out", said.append, storage=str(tmp_path / "thesis.txt"))
    assert driver.ask().params == running.params
    assert (tmp_path / "thesis.txt").read_text() == "years of work\n" and "left alone" in said[0] and len(said) == 1


@pytest.mark.parametrize("trouble", [OSError(28, "No space left on device"), RuntimeError("Error: did not possess lock")])
def test_a_journal_that_cannot_be_written_any_more_does_not_stop_the_search(tmp_path, monkeypatch, caplog, trouble):
    undisturbed = Driver.begin(tmp_path / "undisturbed").rest()
    driver = Driver.begin(tmp_path / "out")
    for _ in range(3):
        driver.end(driver.ask())

    def fail(self, logs):
        raise trouble

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(optuna.storages.journal.JournalFileBackend, "append_logs", fail)
        rest = driver.rest()
    assert rest == undisturbed[3:]
    assert [r.getMessage() for r in caplog.records if "the search goes on" in r.getMessage()] == [caplog.records[0].getMessage()], "said once"
    assert Driver.resume(tmp_path / "out").told() == driver.told()


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(b""), lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes() + b"{")])
def test_a_journal_that_is_damaged_in_mid_search_does_not_stop_it(tmp_path, damage):
    undisturbed = Driver.begin(tmp_path / "undisturbed").rest()
    driver = Driver.begin(tmp_path / "out")
    for _ in range(3):
        driver.end(driver.ask())
    damage(tmp_path / "out" / "study.journal")
    assert driver.rest() == undisturbed[3:]


def test_an_unwritable_place_for_the_journal_leaves_the_search_in_memory(tmp_path, interrupted):
    folder, running, rest, told = interrupted
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "blocked").write_text("a file where a folder should be")
    said = []
    driver = Driver.resume(tmp_path / "out", said.append, storage=str(tmp_path / "blocked" / "j"))
    assert driver.ask().params == running.params and len(said) == 1 and "without a journal" in said[0]


# ------------------------------------------------------------------------------------------------ ids


@pytest.mark.parametrize("witness", ["folder", "trials.csv", "journal", "tracking.json"])
def test_an_id_that_any_file_names_is_not_given_again(tmp_path, witness):
    driver = Driver.begin(tmp_path)
    driver.end(driver.ask())
    if witness == "folder":
        (tmp_path / "trials" / "t0041").mkdir()
    elif witness == "trials.csv":
        (tmp_path / "trials.csv").write_text("trial_id,recipe\nt0041,full\nt0040s1,full\n")
    elif witness == "journal":
        (tmp_path / "study.journal").write_text('torn {"user_attr": {"trial_id": "t0041"}}\nx')
    else:
        (tmp_path / "tracking.json").write_text('{"runs": {"t0041": "abc"}, "uri": "/data/t20240101/x"')
    assert Driver.resume(tmp_path).ask().trial_id == "t0042"


def test_the_journal_gone_runs_no_finished_trial_again(tmp_path, interrupted):
    folder, running, *_ = interrupted
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "study.journal").unlink()
    driver = Driver.resume(tmp_path / "out")
    finished = {r.trial_id for r in driver.found.results}
    assert finished == {f"t{n:04d}" for n in range(1, 6)} and not finished & {asked[0] for asked in driver.rest()}


# ------------------------------------------------------------------------------------------------ whose fault


def failed(driver, asked, fault):
    driver.end(asked, state="failed", error="its worker died", fault=fault, task=None)


def test_only_a_trials_own_fault_is_final(tmp_path):
    driver = Driver.begin(tmp_path)
    for fault in ("machine", "trial", "safebasin", None):
        failed(driver, driver.ask(), fault)
    driver.end(driver.ask())
    again = Driver.resume(tmp_path)
    assert [again.ask().trial_id for _ in range(2)] == ["t0001", "t0003"] and not again.ask().resumed
    assert {r.trial_id for r in again.found.results} == {"t0002", "t0004", "t0005"}
    assert json.loads((tmp_path / "trials" / "t0001" / "result.failed-1.json").read_text())["error"] == "its worker died"
    assert "t0001 had failed by a machine's fault (its worker died); it is tried again" in again.found.sentences[0]


def test_every_failed_trial_is_tried_again_on_request_and_no_record_is_lost(tmp_path):
    driver = Driver.begin(tmp_path)
    for fault in ("machine", "trial", None):
        failed(driver, driver.ask(), fault)
    driver.end(driver.ask())
    for round_ in (1, 2):
        found = trial_records.read(tmp_path, driver.made, SPACES, RUN, retry_failed=True)
        assert [one.trial_id for one in found.open] == ["t0001", "t0002", "t0003"] and [r.trial_id for r in found.results] == ["t0004"]
        for one in found.open:
            assert (tmp_path / "trials" / one.trial_id / f"result.failed-{round_}.json").exists()
            result = TrialResult(one.trial_id, one.recipe, {**SPACES[one.recipe].fixed, **one.params}, 0, "search", "failed", error="again")
            files.write_json(tmp_path / "trials" / one.trial_id / "result.json", result.to_dict())


# ------------------------------------------------------------------------------------------------ what a run was begun with


def begun(tmp_path, **changes):
    made = experiment(tmp_path, **changes)
    identity.write(tmp_path, identity.new(made, {"model": "a", "task.data": "b", "safety.suites.harmful": "c"}))
    return made


FREE = [
    {"search": {"trials": 99}}, {"search": {"time_budget_s": 5.0}}, {"search": {"seeds": [0, 1, 2]}}, {"search": {"finalists": 1}},
    {"search": {"max_concurrent_trials": 3}}, {"name": "other"}, {"tracking": {"enabled": False}}, {"ray": {"lanes": 4}},
    {"ray": {"address": "auto"}},
    {"output": {"keep_models": "all"}}, {"training": {"save_steps": 7}}, {"safety": {"keep_generations": True}},
]  # fmt: skip
BOUND = {
    "recipes": {"recipes": [["full"]]}, "safety.limits.max_degradation": {"safety": {"limits": {"max_degradation": 0.5}}},
    "safety.suites": {"safety": {"suites": [{"name": "harmful", "data": "pocket:harmful", "limit": 3}]}},
    "model.model_name_or_path": {"model": {"model_name_or_path": "other"}}, "task.data": {"task": {"data": "pocket:echo"}},
    "safety.judge": {"safety": {"judge": "exact"}}, "task.metric": {"task": {"metric": "contains"}},
    "task.max_new_tokens": {"task": {"max_new_tokens": 7}},
    "training.learning_rate": {"training": {"learning_rate": 0.5}}, "search.space": {"search": {"space": {"learning_rate": 1e-3}}},
    "search.seeds": {"search": {"seeds": [5]}}, "ray.num_workers": {"ray": {"num_workers": 2}},
    "monitor.every_steps": {"monitor": {"every_steps": 3}},
    "deepspeed": {"deepspeed": {"zero_optimization": {"stage": 1}}},
}  # fmt: skip


def edited(made, change):
    raw = made.model_dump(mode="json")
    for section, values in change.items():
        raw[section] = {**raw[section], **values} if isinstance(values, dict) else values
    return config.from_dict(raw)


@pytest.mark.parametrize("change", FREE, ids=str)
def test_a_change_that_no_figure_depends_on_is_accepted(tmp_path, change):
    made = begun(tmp_path)
    identity.check_config(tmp_path, edited(made, change))


@pytest.mark.parametrize("key", BOUND)
def test_a_change_that_figures_depend_on_is_refused_with_the_difference(tmp_path, key):
    made = begun(tmp_path)
    with pytest.raises(ConfigError, match=f"{key}.*there.*here.*cannot be compared.*undo the change") as caught:
        identity.check_config(tmp_path, edited(made, BOUND[key]))
    assert "\n" not in str(caught.value)


def test_an_edit_of_the_resolved_config_is_noticed_and_a_torn_one_is_not_needed(tmp_path):
    from orchestrator.experiment import resume as resuming

    made = begun(tmp_path)
    path = files.write_text(tmp_path / layout.CONFIG, config.dump_yaml(made))
    assert resuming.interrupted(resuming.load(tmp_path), tmp_path)
    path.write_text(path.read_text().replace("max_degradation: 0.05", "max_degradation: 0.5"))
    with pytest.raises(ConfigError, match="safety.limits.max_degradation: 0.05 there, 0.5 here"):
        resuming.interrupted(resuming.load(tmp_path), tmp_path)
    path.write_bytes(b"\0" * 400)
    assert resuming.load(tmp_path).safety.limits.max_degradation == 0.05 and (tmp_path / f"{layout.CONFIG}.damaged-1").exists()
    path.write_text("search: {trials: many}\n")
    with pytest.raises(ConfigError, match="search.trials"):
        resuming.load(tmp_path)


def test_content_that_changed_is_named(tmp_path):
    from orchestrator.experiment import resume as resuming

    made = begun(tmp_path)
    with pytest.raises(ConfigError, match="safety.suites.harmful, task.data: the content changed"):
        resuming.take_over(tmp_path, made, {"model": "a", "task.data": "B", "safety.suites.harmful": "C"}, print)


def test_a_lost_identity_is_said_and_the_trials_are_still_this_runs(tmp_path):
    from orchestrator.experiment import resume as resuming

    driver = Driver.begin(tmp_path)
    driver.end(driver.ask())
    (tmp_path / identity.FILE).write_text('{"format": 1, "ru')
    said = []
    assert resuming.take_over(tmp_path, driver.made, {"model": "a"}, said.append) == RUN
    assert any("moved to run.json.damaged-1" in line for line in said) and identity.read(tmp_path).run == RUN


def test_a_path_of_a_journal_moved_aside_is_never_overwritten(tmp_path):
    for _ in range(3):
        (tmp_path / "x").write_text("a")
        journal.move_aside(tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.damaged-1", "x.damaged-2", "x.damaged-3"]
