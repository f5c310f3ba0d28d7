"""No text from elsewhere is obeyed: not by the terminal, not as Rich's markup, not in HTML, Markdown, a picture or MLflow's notes."""

from __future__ import annotations

import ast
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import made_up
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from orchestrator import texts
from orchestrator.decision import limits
from orchestrator.decision import selection as decision_selection
from orchestrator.experiment.progress import Dashboard
from orchestrator.records import TrialResult
from orchestrator.report import figures, fill, page, run
from orchestrator.report.alerts import Alert
from orchestrator.report.plots import canvas, refusals, trials
from orchestrator.report.plots.canvas import Plot
from orchestrator.report.plots.refusals import Arm
from orchestrator.storage import cells
from orchestrator.terminal import screen
from orchestrator.verbs import compare, doctor

ROOT = Path(__file__).parents[2]
HOSTILE = (
    "[INST] hi [/INST]", "[/b]", "a[red]", "[bold", "\\[x]", ":smile:", "[link=http://x]y[/link]",
    "\x1b[2J\x1b]0;title\x07", "a\rb\x08c", "\u202eevil",
    "half \udcff", "|a|b|", "`x` ``y``", "<script>alert(1)</script>", "</script><b>", '"><img src=x onerror=alert(1)>', "$a$b$", r"$\foo$",
    "[l](http://x)", "![p](http://x)", "[d]: http://x", "**b** _i_ ~~s~~", "# h", "_hidden", "{{ 7*7 }}", "{% raw %}", "%s {0}", "=1+1", "",
)  # fmt: skip
WORDS = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=40), st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=3).map(" ".join))
FEW = settings(derandomize=True, deadline=None, max_examples=60, database=None)


def on(width: int = 4_000, **options) -> Console:
    return screen.Screen(file=io.StringIO(), width=width, **options)


def squeezed(text: str) -> str:
    """Text without white space: lines are broken and padded on a screen."""
    return "".join(text.split())


def shown(text: str) -> str:
    return squeezed(texts.clean(text))


# ---------------------------------------------------------------------------------------------------------------- the rule itself


FORBIDDEN = {"Console", "Table", "Panel", "Text.from_markup", "from_markup", "TextColumn", "Progress", "track", "Prompt", "Markdown", "Rule", "Tree"}


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""


@pytest.mark.parametrize("path", sorted((ROOT / "orchestrator").rglob("*.py")), ids=lambda p: p.name)
def test_only_the_screen_prints_with_rich(path):
    if path.name == "screen.py":
        return
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rich"):
            names = {alias.name for alias in node.names}
            assert names <= {"Console", "Group", "Live", "Text"}, f"{path.name}:{node.lineno} imports {names}; take it from terminal.screen"
        if isinstance(node, ast.Call):
            assert called(node) not in FORBIDDEN, f"{path.name}:{node.lineno} makes its own {called(node)}; take orchestrator.terminal.screen's"
            prints = isinstance(node.func, ast.Attribute) and node.func.attr in ("print", "print_json", "log", "rule")
            assert not (prints and "onsole" in ast.unparse(node.func)), f"{path.name}:{node.lineno} prints without screen.say or screen.show"


def test_templates_escape_by_themselves():
    for path in (ROOT / "orchestrator").glob("*.j2"):
        assert not re.search(r"\|\s*safe\b|autoescape", path.read_text()), f"{path.name} switches escaping off"


# ------------------------------------------------------------------------------------------------------------------- the terminal


@FEW
@given(WORDS)
@pytest.mark.parametrize("make", [on, lambda: Console(file=io.StringIO(), width=4_000)], ids=["ours", "a caller's"])
def test_what_is_said_appears_as_it_is(make, text):
    console = make()
    screen.say(console, text, "bold red")
    screen.say(console, Text("a ") + Text(text), whole=True)
    table = screen.Grid("[x]", title=f"t {text}")
    table.add_column(text)
    table.add_row(text, screen.styled(text, "green"))
    screen.show(console, table)
    told = console.file.getvalue()
    assert squeezed(told).count(shown(text)) >= (5 if len(text.splitlines()) == 1 else 3) or not shown(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", told)


@FEW
@given(WORDS)
def test_our_console_takes_rich_s_own_things_too(text):
    console = on()
    console.print(text, Panel(text), style="bold")
    console.print(text, markup=True, emoji=True, highlight=True)
    assert squeezed(console.file.getvalue()).count(shown(text)) >= 3 or not shown(text)


@FEW
@given(WORDS, st.booleans())
def test_a_search_is_shown_whatever_its_names(text, terminal):
    console = on(400, force_terminal=terminal, _environ={"TERM": "dumb"} if not terminal else {"TERM": "xterm", "COLUMNS": "400"})
    result = TrialResult(text, f"lora {text}", {}, 0, "search", "failed", error=text)
    judged = limits.judge(result, made_up.baseline(), made_up.experiment(Path("/nowhere")).safety.limits)
    with Dashboard(console, 3, 1) as dashboard:
        dashboard.event(text, {"kind": "started", "recipe": text, "phase": text})
        dashboard.event(text, {"kind": "rollback", "step": 3, "to_step": 1, "rollbacks": 1, "added": text, "peak_rate": 0.1})
        dashboard.say(text)
        dashboard.finished(result, judged)
    told = console.file.getvalue()
    assert shown(text) in squeezed(told)
    assert "\x1b]0;" not in told and "\x07" not in told and "\u202e" not in told


def test_bars_take_names_as_they_are(tmp_path):
    console = on(200, force_terminal=True)
    with screen.bar(console, "description", "bar", "count", "field:eta") as bar:
        bar.add_task("of [/b] a[red] :smile:", total=2, eta="[/x]")
        bar.refresh()
    told = console.file.getvalue()
    assert "of [/b] a[red] :smile:" in told and "[/x]" in told


def test_a_stream_that_goes_away_ends_no_run(capsys):
    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    console = screen.Screen(file=screen._Steady(Broken()))
    for _ in range(3):
        screen.say(console, "trial t0001")
    assert capsys.readouterr().err.count("nothing more can be printed") == 1
    with pytest.raises(BrokenPipeError):
        screen.say(screen.Screen(file=Broken()), "a list")


def test_findings_of_the_doctor(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda experiment: [doctor.Finding("[/b]", "fail", "in a[red]/:smile:")])
    assert doctor.show(None, []) == 1
    told = capsys.readouterr().out
    assert "[/b]" in told and "a[red]/:smile:" in told


# -------------------------------------------------------------------------------------------------------------- reports and pages


class Tags(HTMLParser):
    """Tags of a page, with what their attributes are called; its text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, tuple(name for name, _ in attributes)))

    def handle_data(self, data):
        self.text += data


def hostile_experiment(folder: Path, text: str):
    """An experiment and its trials with `text` wherever a name, an error or a setting is read back."""
    experiment = made_up.experiment(folder)
    suites = tuple(s.model_copy(update={"name": f"{s.name}{text}"}) for s in experiment.safety.suites)
    model = experiment.model.model_copy(update={"model_name_or_path": f"m{text}", "system_prompt": text})
    experiment = experiment.model_copy(update={
        "safety": experiment.safety.model_copy(update={"suites": suites}), "model": model,
    })  # fmt: skip
    before, rows = made_up.trials(experiment.safety.limits, count=6)

    def renamed(result: TrialResult) -> TrialResult:
        raw = result.to_dict()
        raw["suites"] = {f"{name}{text}": suite | {"name": f"{name}{text}"} for name, suite in raw["suites"].items()}
        raw["params"] = raw["params"] | {f"knob{text}": text}
        raw["error"] = text
        for suite in raw["suites"].values():
            suite["groups"] = [f"{group}{text}" for group in suite["groups"]] if suite["groups"] else suite["groups"]
            suite["source"] = {"data": text, "file": text, "sha256": "0" * 64, "licence": text}
        return TrialResult.from_dict(raw)

    before = renamed(before)
    results = [renamed(result) for result, _ in rows]
    return experiment, before, [(result, limits.judge(result, before, experiment.safety.limits)) for result in results]


@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures are tried apart: they take most of the time."""
    monkeypatch.setattr(trials, "all_plots", lambda *_: [])
    monkeypatch.setattr(refusals, "report_plots", lambda *_: [])
    monkeypatch.setattr(refusals, "failures", lambda arms, level: Plot("a", "b", None, arms[0].label))
    monkeypatch.setattr(refusals, "pictures", lambda arms, level: [])


TOGETHER = [" ".join(HOSTILE[i : i + 3]) for i in range(0, len(HOSTILE), 3)] + ["\n# new line\n- x\n```", "a" * 3000]


@pytest.mark.parametrize("text", TOGETHER, ids=range(len(TOGETHER)))
def test_a_report_holds_names_as_text(tmp_path, no_pictures, text):
    plain = write_report(tmp_path / "plain", "name")
    html, markdown, card = write_report(tmp_path / "hostile", text)
    assert sorted(but_code(Tags(html).tags)) == sorted(but_code(Tags(plain[0]).tags)), "a name made a tag or an attribute"
    assert shown(text) in squeezed(Tags(html).text) or "\n" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", html + markdown + card)
    assert but_code(tokens(markdown)) == but_code(tokens(plain[1])), "a name made markup"
    assert but_code(tokens(card)) == but_code(tokens(plain[2]))


def but_code(tags: list) -> list:
    """Without `code`: spans in backticks are the one markup of our sentences, also where a name in them has backticks; its text is escaped."""
    return [tag for tag in tags if tag not in (("code", ()), "code_inline")]


def write_report(folder: Path, text: str) -> tuple[str, str, str]:
    experiment, before, rows = hostile_experiment(folder, text)
    selection = decision_selection.best(rows)
    assert selection.best is not None
    paths = run.write_report(folder, experiment, before, rows, selection, {"hashes": {"model": "0"}})
    return paths[0].read_text(), paths[1].read_text(), run.model_card(experiment, before, selection)


def tokens(markdown: str) -> list[str]:
    """What a Markdown reader sees beside text: blocks, spans, links, pictures, HTML."""
    from markdown_it import MarkdownIt

    found = []
    for token in MarkdownIt("gfm-like", {"linkify": False}).parse(markdown):
        found.append(token.type)
        found += [child.type for child in token.children or () if child.type not in ("text", "text_special", "softbreak")]
    return found


@FEW
@given(WORDS)
def test_markdown_of_any_text(text):
    plain = {"paragraph_open", "inline", "paragraph_close"}
    assert set(tokens(f"x {texts.markdown(text)} x")) <= plain
    assert set(tokens(f"**a {texts.markdown(text)} a**")) <= plain | {"strong_open", "strong_close"}
    assert [t for t in tokens(texts.code(text)) if t not in plain] == ["code_inline"]
    assert tokens(fill.block(text)) == ["fence"]
    row = tokens(f"| a | b |\n|---|---|\n| {texts.markdown(text)} | {texts.code(text)} |\n")
    assert row.count("td_open") == 2 and row.count("tr_open") == 2 and row.count("code_inline") == 1


@pytest.mark.parametrize("text", HOSTILE)
def test_a_page_holds_names_as_text(tmp_path, text):
    def made(text: str) -> str:
        table = {"title": text, "note": text, "head": [text, "b"], "rows": [[text, text]]}
        one = page.Page(
            title=text,
            sentence=text,
            alerts=[Alert(text, "row-score"), Alert(text)],
            notes=[text],
            tables=[table],
            plots=[Plot("p", text, None, text)],
            facts=[(text, text)],
            caveats=[text],
            config=text,
        )
        return page.write(one, tmp_path / "page.html")[0].read_text()

    assert but_code(Tags(made(text or "x")).tags) == but_code(Tags(made("name")).tags)


def test_notes_for_mlflow_are_no_markup(tmp_path):
    experiment, before, rows = hostile_experiment(tmp_path, "[l](http://x) <b>")
    note = figures.note(decision_selection.best(rows), before, experiment)
    assert not {"link_open", "html_inline", "image"} & set(tokens(note))


# ------------------------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("text", ["$a$b$", r"$\foo$", "_hidden", "\x1b[31m\x00", "\u202e\udcff", "日本 \U0001f600", "a" * 500, "%s^{x}", "\\frac{"])
def test_pictures_take_any_name(recwarn, text):
    before = made_up.baseline()
    suites = {f"{name} {text}": suite for name, suite in before.suites.items()}
    drawn = refusals.failures([Arm("original", suites), Arm(text, suites)], 0.95)
    assert drawn.png is not None and drawn.png.startswith(b"\x89PNG")
    assert not [str(w.message) for w in recwarn if w.category is UserWarning]
    figure, (axis,) = canvas.figure()
    axis.plot([1], [1], label=canvas.written(text))
    axis.set_title(text)
    legend = axis.legend()
    canvas.png(figure)
    assert len(legend.get_texts()) == 1 and legend.get_texts()[0].get_text().strip()


# ------------------------------------------------------------------------------------------------------------------ tables of files


def test_every_csv_of_ours_goes_through_cells():
    for path in (ROOT / "orchestrator").rglob("*.py"):
        names = {alias.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import) for alias in node.names}
        assert "csv" not in names or path.name in ("cells.py", "rows.py"), f"{path.name} writes its own CSV"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_comparison_of_models_of_any_name(tmp_path, no_pictures, text):
    results = made_up.baseline(), made_up.result("t0000", "lora", {}, asr=0.2)
    entries = tuple(compare.Entry(f"{text} {i}", text, result, {"system_prompt": text * i}) for i, result in enumerate(results))
    found = compare.Comparison(entries, 0.95)
    console = on()
    compare.show(found, console)
    assert shown(f"{text} 1") in squeezed(console.file.getvalue())
    paths = compare.write(found, tmp_path / "out")
    rows = cells.from_csv(paths[0].read_bytes().decode())
    assert {row["model"] for row in rows} == {f"{text} {i}".encode(errors="backslashreplace").decode() for i in (0, 1)}
    assert all(float(row["rate"]) >= 0 for row in rows) and any(row["difference"] and float(row["difference"]) for row in rows)
    assert "onerror" not in str(Tags(paths[1].read_text()).tags)
