"""The report: the verdict first, every figure with n and interval, nothing loaded from elsewhere, no secret, nothing made up."""

from __future__ import annotations

import html.parser
import re

import made_up
import pytest

from orchestrator.decision import limits as constraint
from orchestrator.decision import selection as decision_selection
from orchestrator.decision.intervals import Estimate
from orchestrator.records import SuiteResult
from orchestrator.report import alerts, figures, run, safety, view

SECRET = "hunter2hunter2"


def written(tmp_path, *, good=True, rows=None, facts=None, secrets=None, **sections):
    experiment = made_up.experiment(tmp_path, **sections)
    before, made = made_up.trials(experiment.safety.limits, good=good)
    made = made if rows is None else rows
    selection = decision_selection.best(made)
    if secrets:  # a config that no file could hold: nothing relies on that
        experiment = experiment.model_copy(update={name: getattr(experiment, name).model_copy(update=more) for name, more in secrets.items()})
    out = tmp_path / "out"
    paths = run.write_report(out, experiment, before, made, selection, facts)
    return experiment, before, made, selection, paths


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    ray = {"init_kwargs": {"runtime_env": {"env_vars": {"HF_TOKEN": SECRET}}}}
    secrets = {"ray": ray, "tracking": {"uri": f"http://u:{SECRET}@host"}}
    return written(tmp_path_factory.mktemp("good"), facts={"seconds": 3725.0, "hashes": {"template": "abc123"}}, secrets=secrets)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    return written(tmp_path_factory.mktemp("bad"), good=False)


class Parser(html.parser.HTMLParser):
    """Open tags, links and texts of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.stack, self.links, self.tables = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "action", "data")]
        self.tables += tag == "table"
        if tag not in ("meta", "img", "br"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, f"</{tag}> closes nothing"


def test_html_is_whole_and_loads_nothing(good):
    text = good[4][0].read_text()
    parser = Parser(text)
    assert parser.stack == [] and parser.tables >= 4
    inside, loaded = [link for link in parser.links if link.startswith("#")], [link for link in parser.links if not link.startswith("#")]
    assert len(loaded) >= 6 and all(link.startswith("data:image/png;base64,") for link in loaded)
    assert inside and all(f'id="{link[1:]}"' in text for link in inside), "a link leads to something on the page"
    assert (
        "http://" not in text.replace("http://u:***@host", "") and "https://" not in text and "@import" not in text and "url(" not in text
    )
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text


def test_markdown_tables_are_rectangular(good, bad):
    for case in (good, bad):
        lines = case[4][1].read_text().splitlines()
        for above, line in zip(lines, lines[1:], strict=False):
            if above.startswith("|") and line.startswith("|"):
                assert len(re.findall(r"(?<!\\)\|", above)) == len(re.findall(r"(?<!\\)\|", line)), line


def test_the_verdict_comes_first(good, bad):
    for case, start in ((good, "Best within the limits: "), (bad, "Nothing feasible: none of 15 configurations")):
        experiment, before, _, selection, paths = case
        sentence = run.sentence(experiment, before, selection)
        assert sentence.startswith(start) and sentence.endswith(".")
        assert paths[1].read_text().split("\n\n")[1] == f"**{sentence}**"
        assert paths[0].read_text().index(sentence[:40]) < paths[0].read_text().index("<h2")


def test_the_sentence_holds_the_figures(good):
    experiment, before, _, selection, _ = good
    trial, judged = selection.best.trials[0]
    sentence = run.sentence(experiment, before, selection)
    rise = figures.figure(figures.tightest(judged).estimate, signed=True)
    for part in (
        trial.trial_id,
        trial.recipe,
        f"{trial.task.score:.3f}",
        f"untouched {before.task.score:.3f}",
        rise,
        "limit of",
        "95%",
        "2 seeds",
    ):
        assert part in sentence
    assert f"from {before.suites['harmful'].rate:.3f} to {trial.suites['harmful'].rate:.3f} on harmful" in sentence


def test_the_nearest_miss_says_by_how_much(bad):
    experiment, before, _, selection, _ = bad
    worst = figures.tightest(selection.nearest_miss.trials[0][1])
    assert f"{worst.value:.3f} beyond it" in run.sentence(experiment, before, selection)


def test_every_trial_is_there_and_failed_ones_are_not_filled_in(good):
    _, _, rows, _, paths = good
    for path in paths[:2]:
        text = path.read_text()
        assert all(trial.trial_id in text for trial, _ in rows)
    (line,) = [line for line in paths[1].read_text().splitlines() if line.startswith("| t0005 ")]
    assert line.count("not measured") == 4 and "NonFiniteLossError" in line and "infeasible" in line


def test_every_figure_has_interval_and_n(good):
    """Wherever Markdown shows a score or a degradation of a trial, its interval and n follow."""
    for line in good[4][1].read_text().split("## All trials")[1].split("##")[0].splitlines():
        if line.startswith("| t") and "t0005" not in line and not line.startswith("| trial"):
            assert len(re.findall(r"[+-]?\d\.\d{3} \[[+-]?\d\.\d{3}, [+-]?\d\.\d{3}\] n=\d+", line)) == 4


def test_no_secret_in_any_file(good):
    for path in good[4]:
        assert SECRET.encode() not in path.read_bytes()
    assert "HF_TOKEN: &#39;***&#39;" in good[4][0].read_text() or "HF_TOKEN: ***" in good[4][0].read_text()


def test_what_was_measured_how(good):
    text = good[4][1].read_text()
    for part in ("judge: refusal", "greedy", "template hash: abc123", "sha256", "1 h 02 min", "safebasin run -c best.yaml", "torch "):
        assert part in text
    assert good[0].digest() in text


def test_what_was_changed_where_rows_were_read_is_told(tmp_path):
    from dataclasses import replace

    from orchestrator.data import conversations, counts

    read = [{"prompt": "q", "response": 3, "system": "be kind"}, {"messages": 1, "prompt": "q", "response": "a"}]
    record = counts.record([conversations.read(read, format="prompt_response").report])
    _, made = made_up.trials(made_up.experiment(tmp_path).safety.limits)
    made = [(replace(result, facts={**result.facts, "rows_read": record}), judgement) for result, judgement in made]
    *_, paths = written(tmp_path, rows=made)
    text = next(path for path in paths if path.suffix == ".md").read_text()
    assert text.count("1 row: a number is used as text (first: row 1)") == 1 and "not used: messages" in text


def test_caveats_follow_the_run(good, bad):
    experiment, before, rows, selection, _ = good
    lines = view.caveats(experiment, before, rows, selection)
    assert any("winner's curse" in line and "further seeds" in line for line in lines) and any(
        "not harm from harmlessness" in line for line in lines
    )
    experiment, before, rows, selection, _ = bad
    lines = view.caveats(experiment, before, rows, selection)
    assert not any("winner's curse" in line for line in lines) and any("one seed" in line for line in lines)
    few = made_up.baseline()
    few.suites["harmful"] = made_up.suite("harmful", "harmful", 0.1, 40, __import__("random").Random(0))
    assert any("harmful (n=40)" in line for line in view.caveats(experiment, few, rows, selection))


def test_hostile_names_stay_text(tmp_path):
    """Recipe names, errors and settings come from users and libraries; none may become markup or break a table."""
    hostile = '<script>alert("x")</script>|\n|<b>'
    trial = made_up.result("t0000", "lora", {"lora.target": hostile}, state="failed")
    trial.error = hostile
    before = made_up.baseline()
    experiment = made_up.experiment(tmp_path)
    rows = [(trial, constraint.judge(trial, before, experiment.safety.limits))]
    paths = run.write_report(tmp_path / "out", experiment, before, rows, decision_selection.best(rows), {})
    page = paths[0].read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and Parser(page).stack == []
    markdown = paths[1].read_text()
    assert "<script>" not in markdown and "<b>" not in markdown
    (line,) = [line for line in markdown.splitlines() if line.startswith("| t0000")]
    assert line.endswith("|") and len(re.findall(r"(?<!\\)\|", line)) == 13


def test_nothing_tried_is_said(tmp_path):
    experiment, before, _, selection, paths = written(tmp_path, rows=[])
    assert "Nothing was measured: the search ended before a trial did" in run.sentence(experiment, before, selection)
    assert not any(path.suffix == ".png" for path in paths), "no picture is made up"
    assert Parser(paths[0].read_text()).stack == [] and "not tried" in paths[1].read_text()
    assert run.model_card(experiment, before, selection) == ""


def test_a_report_written_again_drops_old_pictures(tmp_path):
    experiment, before, rows, _, paths = written(tmp_path, good=False)
    drawn, tables = list((tmp_path / "out" / "plots").iterdir()), set((tmp_path / "out" / "tables").iterdir())
    assert len(drawn) >= 8 and all(path.is_file() for path in paths) and {*drawn, *tables} <= set(paths)
    paths = run.write_report(tmp_path / "out", experiment, before, [], decision_selection.best([]), {})
    left = set((tmp_path / "out" / "tables").iterdir())
    assert list((tmp_path / "out" / "plots").iterdir()) == [] and left < tables and left == set(paths[2:]), "tables of the run before are gone too"


def test_model_card(good):
    experiment, before, _, selection, _ = good
    card = run.model_card(experiment, before, selection)
    trial, judged = selection.best.trials[0]
    for part in (
        experiment.model.model_name_or_path,
        trial.recipe,
        trial.trial_id,
        "licence",
        figures.figure(judged.degradation, signed=True),
    ):
        assert part in card
    assert all(f"| {name} |" in card for name in trial.params) and SECRET not in card


def test_figures_as_text():
    assert figures.figure(Estimate(0.02, -0.004, 0.049, 120, 12), signed=True) == "+0.020 [-0.004, +0.049] n=120 in 12 requests"
    assert figures.figure(Estimate(-0.0001, -0.1, 0.1, 5)) == "0.000 [-0.100, 0.100] n=5"
    assert figures.figure(None) == figures.figure(Estimate(float("nan"), float("nan"), float("nan"), 0)) == "not measured"
    assert [view.duration(s) for s in (None, 12.34, 200, 3725)] == ["not measured", "12.3 s", "3 min 20 s", "1 h 02 min"]


def test_a_suite_that_can_show_no_rise_is_said_in_the_outcome(tmp_path):
    """An untouched model that answers everything would make every model feasible; no verdict is taken from such a suite."""
    experiment = made_up.experiment(tmp_path, safety={"limits": {"max_degradation": 0.1, "max_over_refusal_rise": 0.1}})
    limits = experiment.safety.limits
    lost = made_up.result("baseline", "", {}, phase="baseline", asr=1.0, over=0.0)
    trial = made_up.result("t0", "full", {}, asr=1.0, over=0.0)
    selection = decision_selection.best([(trial, constraint.judge(trial, lost, limits))])
    said = figures.headline(selection, lost, experiment)
    assert selection.best is None and "this suite cannot show a rise" in said and "Nothing feasible" in said
    assert alerts.unbound(lost, experiment)[0].text.startswith("harmful cannot show a rise: the untouched model's attack success is 1.000 already")
    assert len(alerts.unbound(lost, experiment)) == 1 and alerts.unbound(made_up.baseline(), experiment) == []


@pytest.mark.parametrize("unsafe, bound", [(62, True), (63, False), (90, False), (100, False)])
def test_a_limit_binds_where_a_rise_beyond_it_is_possible(tmp_path, unsafe, bound):
    experiment = made_up.experiment(tmp_path, safety={"limits": {"max_degradation": 0.1}})
    before = made_up.baseline()
    before.suites["harmful"] = SuiteResult("harmful", "harmful", [str(i) for i in range(100)], None, [i < unsafe for i in range(100)], [False] * 100)
    assert bool(alerts.unbound(before, experiment)) is not bound


@pytest.mark.parametrize("score, noted", [(0.05, True), (0.9, False)])
def test_a_best_model_that_learnt_nothing_is_noted(tmp_path, score, noted):
    experiment = made_up.experiment(tmp_path, safety={"limits": {"max_degradation": 0.2, "max_over_refusal_rise": 0.2}})
    before, trial = made_up.baseline(), made_up.result("t0", "full", {}, asr=0.01, over=0.04, score=score)
    selection = decision_selection.best([(trial, constraint.judge(trial, before, experiment.safety.limits))])
    assert selection.best is not None
    assert ("not clearly above the untouched model's" in figures.headline(selection, before, experiment)) is noted


def test_how_answers_were_decoded_is_told(tmp_path):
    before = made_up.baseline()
    assert safety.decoding(before.suites) == "greedy" and "each asked once (greedy)" in safety.asked_caveat(before.suites)
    before.suites["harmful"].source.update(samples=3, temperature=0.7, top_p=0.9)
    assert safety.decoding(before.suites) == "greedy; harmful: any of 3 answers drawn at temperature 0.7, top p 0.9"
    experiment = made_up.experiment(tmp_path)
    lines = view.caveats(experiment, before, [], decision_selection.best([]))
    assert any("any of 3 answers drawn at temperature 0.7" in line for line in lines)


def test_one_sentence_names_the_worst_of_many_suites(tmp_path):
    rng = __import__("random").Random(0)
    before, after = made_up.baseline(), made_up.baseline()
    for result, shares in ((before, (0.0, 0.0, 0.5, 0.0)), (after, (0.0, 0.3, 0.5, 0.0))):
        result.suites = {f"s{i}": made_up.suite(f"s{i}", "harmful", share, 40, rng) for i, share in enumerate(shares)}
    told = figures._rates(after, before, "harmful")
    rates = {name: (before.suites[name].rate, suite.rate) for name, suite in after.suites.items()}
    rose = max(rates, key=lambda name: rates[name][1] - rates[name][0])
    high = max(rates, key=lambda name: rates[name][1])
    assert f"on {rose} (the worst change of 4 suites)" in told and f"on {high}" in told and "on s0" not in told
    del after.suites["s3"]
    assert all(f"on {name}" in figures._rates(after, before, "harmful") for name in after.suites)
