"""Pages as people see them: in headless Chromium on a phone, a desk and paper. `make browser` runs this; it fails where there is no Chromium."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import chromium
import made_up

from orchestrator.decision import limits
from orchestrator.decision import selection as decision_selection
from orchestrator.report import run

SIDEWAYS = """(() => {
  const width = document.documentElement.clientWidth;
  const out = Array.from(document.querySelectorAll("body *")).filter(e => !e.closest(".scroll") && e.getBoundingClientRect().right > width + 1);
  return [document.documentElement.scrollWidth - width, out.map(e => e.tagName + " " + e.textContent.slice(0, 60))];
})()"""
NARROW = """Array.from(document.querySelectorAll("td, th, dd, dt, li, p")).filter(e => {
  const box = e.getBoundingClientRect(), style = getComputedStyle(e);
  return box.height > 0 && e.textContent.trim().length > 12 && box.width - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight) < 30;
}).map(e => e.tagName + " " + e.textContent.slice(0, 60))"""
CLIPPED = """Array.from(document.querySelectorAll("td, th, dd, pre, .lead, .alert")).filter(e => {
  const hidden = ["hidden", "clip"].includes(getComputedStyle(e).overflowX);
  return e.getBoundingClientRect().height > 0 && (hidden && e.scrollWidth > e.clientWidth + 1);
}).map(e => e.textContent.slice(0, 60))"""
CUT_ON_PAPER = """(() => {
  window.dispatchEvent(new Event("beforeprint"));
  const width = document.documentElement.clientWidth;
  return [
    Array.from(document.querySelectorAll("td, th, dd, pre")).filter(e => e.getBoundingClientRect().right > width + 1)
      .map(e => e.textContent.slice(0, 60)),
    Array.from(document.querySelectorAll("details")).filter(e => !e.open).length,
  ];
})()"""
A4 = 703
"""px between the margins of the page: 210 - 24 mm at 96 dots an inch."""


@pytest.fixture(scope="module")
def browser():
    with chromium.started() as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with everything that is wide: long names, two judges, a suite that no limit holds, a failed trial, a recipe that was not tried."""
    folder = tmp_path_factory.mktemp("page")
    experiment = made_up.experiment(folder, name="a-name-that-is-as-long-as-people-make-them-when-nobody-stops-them-and-no-blank-is-in-it")
    before, rows = made_up.trials(experiment.safety.limits)
    before.suites["harmful"].second_judge = "exact"
    for result in (before, *(r for r, _ in rows)):
        if result.suites:
            harmful = result.suites["harmful"]
            harmful.second_judge, harmful.second = "exact", ["safe" if result is before else "unsafe"] * len(harmful.ids)
    judged = [(r, limits.judge(r, before, experiment.safety.limits)) for r, _ in rows if r.recipe != "lora"]
    return run.write_report(folder / "out", experiment, before, judged, decision_selection.best(judged), {"seconds": 3725.0})[0]


@pytest.mark.parametrize("width", [320, 390, 768, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_scrolls_sideways_but_tables_in_their_boxes(browser, page, width, dark):
    assert browser.look(page, SIDEWAYS, width=width, dark=dark) == [0, []]
    assert browser.look(page, CLIPPED, width=width, dark=dark) == []


def test_no_text_stands_one_letter_a_line_on_a_phone(browser, page):
    assert browser.look(page, NARROW) == []


def test_a_phone_shows_the_report_in_fewer_than_15_screens(browser, page):
    assert browser.look(page, "document.documentElement.scrollHeight") < 15 * chromium.HEIGHT


def test_paper_cuts_no_table_and_opens_what_is_folded(browser, page):
    assert browser.look(page, CUT_ON_PAPER, width=A4, paper=True) == [[], 0]


def test_dark_mode_is_dark_and_its_text_can_be_read(browser, page):
    shown = """(() => { const s = getComputedStyle(document.body);
      return [s.backgroundColor, s.color].map(c => c.match(/\\d+/g).slice(0, 3).map(Number)); })()"""
    for dark in (False, True):
        ground, text = browser.look(page, shown, dark=dark)
        assert (sum(ground) < 150) is dark and abs(sum(ground) - sum(text)) > 450


def test_a_warning_leads_to_the_row_of_its_figure(browser, page):
    links = """Array.from(document.querySelectorAll(".alert a")).map(a => a.getAttribute("href")).map(to => [to, !!document.querySelector(to)])"""
    found = browser.look(page, links)
    assert found and all(there for _, there in found)


def test_no_literal_backtick_is_left(browser, page):
    assert "`" not in browser.look(page, "document.body.innerText")


def test_it_prints(page, tmp_path):
    assert chromium.pdf(page, tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
