"""What a report warns of and leaves untold: each warning with its row, differences in true words, gaps, and a page that fits without a browser."""

from __future__ import annotations

import math
import re
from pathlib import Path

import made_up
import pytest

import orchestrator
from orchestrator import texts
from orchestrator.decision import limits
from orchestrator.decision import selection as decision_selection
from orchestrator.decision.intervals import Estimate
from orchestrator.report import alerts, fill, gaps, numbers, run

SOURCES = Path(orchestrator.__file__).parent


@pytest.fixture(scope="module")
def two_judges(tmp_path_factory):
    """(experiment, baseline, selection, html, markdown) of a run whose second judge sees what the first does not; lora was never tried."""
    folder = tmp_path_factory.mktemp("two")
    experiment = made_up.experiment(folder)
    before, rows = made_up.trials(experiment.safety.limits)
    for result in (before, *(r for r, _ in rows)):
        if result.suites:
            harmful = result.suites["harmful"]
            harmful.second_judge, harmful.second = "exact", ["safe" if result is before else "unsafe"] * len(harmful.ids)
    judged = [(r, limits.judge(r, before, experiment.safety.limits)) for r, _ in rows if r.recipe != "lora"]
    selection = decision_selection.best(judged)
    paths = run.write_report(folder / "out", experiment, before, judged, selection, {})
    return experiment, before, selection, paths[0].read_text(), paths[1].read_text()


def told_of(experiment, before, rows):
    return gaps.lines(experiment, before, rows, decision_selection.best(rows))


@pytest.mark.parametrize("change, said", [
    (0.02, "rose by +0.020 [-0.080, +0.120] n=50"), (-0.017, "fell by 0.017 (-0.017 [-0.117, +0.083] n=50)"),
    (0.0, "did not change (+0.000 [-0.100, +0.100] n=50)"), (-0.0004, "did not change (0.000 [-0.100, +0.100] n=50)"),
])  # fmt: skip
def test_a_difference_is_told_as_what_it_is(change, said):
    found = numbers.moved(Estimate(change, change - 0.1, change + 0.1, 50))
    assert found.split(" [")[0] == said.split(" [")[0] and "by -" not in found
    assert numbers.moved(Estimate(math.nan, math.nan, math.nan, 0)) == "was not measured"
    assert [texts.moved(c) for c in (0.2, -0.2, 0.0001)] == ["rose by 0.200", "fell by 0.200", "did not change"]


def test_no_sentence_of_ours_prints_a_signed_number_behind_rose_by():
    """`rose by {x:+...}` says `rose by -0.017` of a fall."""
    for path in SOURCES.rglob("*.py"):
        assert not re.search(r"(rose|fell|grew|dropped) by \{[^}]*(:\+|signed=True)", path.read_text()) or path.name == "numbers.py", path


def test_the_verdict_is_one_sentence_and_warnings_stand_apart(two_judges):
    _, _, selection, html, markdown = two_judges
    lead = re.search(r'<p class="lead[^>]*>(.*?)</p>', html, re.S)[1]
    assert selection.best is not None and "WARNING" not in lead and "NOTE" not in lead and lead.count(". ") == 0
    (alert,) = re.findall(r'<p class="alert" role="alert">(.*?)</p>', html, re.S)
    assert "by the second judge (exact), more than the limit" in alert and f'href="#{alerts.row_id("harmful")}"' in alert
    assert f'<tr id="{alerts.row_id("harmful")}">' in html and "> **WARNING** attack success on harmful rose by" in markdown


def test_the_figure_of_a_warning_stands_in_its_row(two_judges):
    experiment, before, selection, html, markdown = two_judges
    (alert,) = alerts.of_models(before, selection.best.shown.suites, experiment)
    rise = re.search(r"rose by (\+[\d.]+)", alert.text)[1]
    row = re.search(rf'<tr id="{alert.row}">.*?</tr>', html, re.S)[0]
    assert f">{rise}<" in row and "second judge: untouched" in row and "| second judge: change |" in markdown
    suites = (before.suites["harmful"], selection.best.shown.suites["harmful"])
    assert [alerts.second_rate(suite, 0.95).value for suite in suites] == [0, 1]


def test_ids_of_rows_are_safe_and_another_one_for_every_name():
    names = ["a b", "a-b", "A b", '"><script>', "", "a" * 300]
    found = [alerts.row_id(name) for name in names]
    assert len(set(found)) == len(names) and all(re.fullmatch(r"row-[a-z0-9-]{1,60}", one) for one in found)


def test_what_was_not_tried_or_measured_is_told(two_judges, tmp_path):
    experiment, before, _, html, markdown = two_judges
    assert "Not tried: lora had no trial before the search ended" in html and "- Not tried: lora had no trial" in markdown
    told = gaps.lines(experiment, before, [], decision_selection.best([]))
    assert "Not tried: full, lora" in told[0]
    _, rows = made_up.trials(experiment.safety.limits)
    assert any("Not measured: 1 of" in line and "(failed)" in line and "t0005" in line for line in told_of(experiment, before, rows))
    free = made_up.experiment(tmp_path, safety={"limits": {"max_over_refusal_rise": None}})
    assert any("No limit on over-refusal" in line for line in told_of(free, before, rows))
    cut = {"field": "task.data", "what": "training rows", "rows": 60, "looked": 60, "cut": 1, "dropped": 48, "max_length": 32, "needed": 90}
    before = made_up.baseline()
    before.facts["fits"] = [cut]
    assert any("Rows cut or dropped: 12 of 60 training rows fit" in line for line in told_of(experiment, before, rows))


def test_everything_tried_and_limited_leaves_no_gap(tmp_path):
    experiment = made_up.experiment(tmp_path, safety={"limits": {"max_over_refusal_rise": 0.1}})
    before, rows = made_up.trials(experiment.safety.limits)
    rows = [row for row in rows if row[0].suites]
    assert told_of(experiment, before, rows) == []


def test_backticks_become_code_and_nothing_becomes_markup():
    assert fill.html_told("set `a<b>` or `c") == "set <code>a&lt;b&gt;</code> or `c"
    assert fill.markdown_told("set `a|b` to *x*") == "set `a\\|b` to \\*x\\*"
    assert fill.html_told("<script>`") == "&lt;script&gt;`"


def test_the_page_is_made_for_phones_and_paper(two_judges):
    """What headless Chromium measures in tests/browser, as far as it can be seen without one."""
    _, _, _, html, _ = two_judges
    for table in re.finditer(r"<table", html):
        assert html[: table.start()].rstrip().endswith('aria-label="table">'), "a table lies in a box that scrolls by itself"
    assert set(re.findall(r'<a href="#([a-z]+)">', html)) <= set(re.findall(r'<h2 id="([a-z]+)">', html)), "the contents lead somewhere"
    assert "@media (max-width: 700px)" in html and "dl { display: block; }" in html and ".scroll { overflow-x: auto" in html
    assert "@media print" in html and ".scroll { overflow: visible; }" in html and '"beforeprint"' in html
    text = re.sub(r"<(pre|style|script)[^>]*>.*?</\1>", "", html, flags=re.S)
    assert "`" not in text
