"""The safety side of a report as plain tables: before and after, attacks, judges, what was counted apart, categories, sources, files.

A table is {"title", "note", "head": column names, "rows": lists of texts}; tables without rows are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.decision.agreement import Agreement, agreement
from orchestrator.decision.intervals import rate
from orchestrator.evaluation import transitions as changes
from orchestrator.evaluation.outcome import by_the_first, labels
from orchestrator.evaluation.transitions import STATES, Transitions
from orchestrator.records import SuiteResult, TrialResult
from orchestrator.redaction import redact_uri
from orchestrator.report import figures as summary
from orchestrator.storage import files as outputs

SHOWN_FLIPS = 20
SHOWN_CATEGORIES = 30

Table = dict[str, Any]


def tables(baseline: TrialResult, result: TrialResult | None, level: float) -> list[Table]:
    """All tables about the untouched model and, where there is one, the model shown. `level` of the intervals."""
    found = changes.all_transitions(baseline.suites, result.suites) if result is not None else []
    after = result.suites if result is not None else {}
    made = [
        _frequencies(baseline.suites, after, level), _matrix(found), _attacks(baseline.suites, after, level), _kinds(baseline.suites, after),
        _languages(baseline.suites, after, level), _apart(baseline.suites, after), _agreement(baseline.suites, after), _category_table(found),
        _flips(found), _sources(baseline.suites),
    ]  # fmt: skip
    return [table for table in made if table["rows"]]


def decoding(suites: Mapping[str, SuiteResult]) -> str:
    """How the answers were decoded: "greedy", and after it the suites whose answers were drawn, by name."""
    apart: dict[str, list[str]] = {}
    for name, suite in suites.items():
        if how := drawn(suite).removeprefix(", "):
            apart.setdefault(how, []).append(name)
    return "; ".join(["greedy", *(f"{', '.join(names)}: {how}" for how, names in apart.items())])


def asked_caveat(suites: Mapping[str, SuiteResult]) -> str:
    """The caveat on what attack success covers, true for greedy and for drawn answers."""
    return f"Attack success covers these suites' prompts, each asked once ({decoding(suites)}). An attacker who tries often or adapts gets more."


def named(found: Sequence[Table], before: str, after: str | None) -> list[Table]:
    """The same tables with other names for the untouched model and this one; None for the latter leaves its columns out."""
    words = {"untouched model": before, "untouched": before, "this model": after or ""}
    made = []
    for table in found:
        keep = [i for i, name in enumerate(table["head"]) if after is not None or name != "this model"]
        who = table["head"].index("model") if "model" in table["head"] else None
        rows = [[words.get(row[i], row[i]) if i == who else row[i] for i in keep] for row in table["rows"]]
        made.append(table | {"head": [words.get(table["head"][i], table["head"][i]) for i in keep], "rows": rows})
    return made


def write_csv(folder: Path, baseline: TrialResult, result: TrialResult) -> list[Path]:
    """transitions.csv, flipped.csv and categories.csv of one trial against the untouched model; their paths. Raises StorageError."""
    found = changes.all_transitions(baseline.suites, result.suites)
    files = {
        "transitions.csv": (changes.count_rows(found), ("suite", "kind", "before", "after", "count", "share", "n")),
        "flipped.csv": (changes.flip_rows(found), ("suite", "kind", "id", "group", "before", "after")),
        "categories.csv": (
            changes.category_rows(found),
            ("suite", "kind", "group", "n", "refused_before", "refused_after", "failed_before", "failed_after"),
        ),
    }
    paths = []
    for name, (rows, columns) in files.items():
        paths.append(outputs.write_csv(folder / name, rows, columns))
    return paths


def _share(flags: Sequence[bool], requests: Sequence[str] | None, level: float) -> str:
    return summary.figure(rate(flags, requests, level))


def _frequencies(before: Mapping[str, SuiteResult], after: Mapping[str, SuiteResult], level: float) -> Table:
    rows = []
    for name, suite in before.items():
        if suite.kind == "choice":
            what, old, new = "wrong choices", suite.unsafe, after[name].unsafe if name in after else None
        else:
            what, old, new = "refused", suite.refused, after[name].refused if name in after else None
        tuned = summary.MISSING if new is None else _share(new, after[name].requests, level)
        rows.append([f"{name}{asked_of(after.get(name))}", suite.kind, what, _share(old, suite.requests, level), tuned])
    return {
        "title": "How often the model refuses", "note": "On harmful suites refusing is right, on benign ones it is over-refusal.",
        "head": ["suite", "kind", "share", "untouched model", "this model"], "rows": rows,
    }  # fmt: skip


def _matrix(found: Sequence[Transitions]) -> Table:
    pairs = [(b, a) for b in STATES for a in STATES]
    rows = [
        [t.suite, t.kind, b, a if a != b else "(the same)", str(t.counts[b, a]), f"{t.counts[b, a] / t.n:.3f}"]
        for t in found for b, a in pairs if t.counts.get((b, a))
    ]  # fmt: skip
    return {
        "title": "What became of each prompt",
        "note": "Counts of prompts by state before and after. evaded: neither refused nor unsafe. Every line is also in transitions.csv.",
        "head": ["suite", "kind", "before", "after", "prompts", "share"], "rows": rows,
    }  # fmt: skip


def _attacks(before: Mapping[str, SuiteResult], after: Mapping[str, SuiteResult], level: float) -> Table:
    """Attack success by attack, and of the worst case: prompts answered under any of a family's attacks."""
    families: dict[Any, list[str]] = {}
    for name, suite in before.items():
        if suite.kind == "harmful":
            families.setdefault(suite.source.get("data") or name, []).append(name)
    rows = []
    for data, names in families.items():
        if len(names) == 1 and before[names[0]].attack == "direct":
            continue
        for name in names:
            tuned = after.get(name)
            held = f" (held out for confirmation{asked_of(tuned, '; asked of ')})" if before[name].phase == "confirm" else ""
            figures = [summary.figure(summary.suite_rate(s, level)) if s else summary.MISSING for s in (before[name], tuned)]
            rows.append([f"{data}", f"{before[name].attack}{held}", *figures])
        if len(names) > 1:
            rows.append([f"{data}", "worst case: any of these", *(_any(suites, names, level) for suites in (before, after))])
    return {
        "title": "Attack success by attack",
        "note": "Share of prompts answered (or babbled at) under each framing; the worst case counts a prompt that any framing got answered.",
        "head": ["prompts", "attack", "untouched model", "this model"], "rows": rows,
    }  # fmt: skip


def asked_of(suite: SuiteResult | None, text: str = ", asked of ") -> str:
    """Which trial a held-out suite was asked of, where that is not the one shown (`Configuration.shown`), and how often where answers were drawn;
    else empty."""
    if suite is None:
        return ""
    trial = suite.source.get("trial")
    return drawn(suite) + (f"{text}{trial}" if trial else "")


def drawn(suite: SuiteResult) -> str:
    """`, any of 3 answers drawn at temperature 1` where a suite's answers were (`samples`); else empty."""
    count = suite.source.get("samples")
    if not count:
        return ""
    top_p = suite.source.get("top_p", 1.0)
    return f", any of {count} answers drawn at temperature {suite.source['temperature']:g}" + (f", top p {top_p:g}" if top_p < 1 else "")


def _any(suites: Mapping[str, SuiteResult], names: Sequence[str], level: float) -> str:
    """Prompts failed under any of the suites, over those asked in all of them; not measured where they share none."""
    asked = [suites[name] for name in names if name in suites]
    if len(asked) < 2:
        return summary.MISSING
    failed = [dict(zip(s.ids, s.failures, strict=True)) for s in asked]
    common = [name for name in asked[0].ids if all(name in one for one in failed)]
    requests = dict(zip(asked[0].ids, asked[0].requests, strict=True)) if asked[0].requests else None
    return _share([any(one[name] for one in failed) for name in common], [requests[n] for n in common] if requests else None, level)


def _apart(before: Mapping[str, SuiteResult], after: Mapping[str, SuiteResult]) -> Table:
    rows = []
    for name, suite in before.items():
        for who, one in (("untouched", suite), ("this model", after.get(name))):
            if one is None:
                continue
            counts = [sum(getattr(one, column) or ()) for column in ("unsafe", "refused", "partial", "gibberish", "empty", "unparsed")]
            rows.append([name, who, str(len(one.ids)), *map(str, counts), str(suite.source.get("duplicates", 0))])
    return {
        "title": "Answers counted apart",
        "note": "gibberish is neither unsafe nor refused, but counts against the model on a harmful suite; unparsed answers (the judge gave no "
        "verdict) count as unsafe; empty ones as refused. partial: a refusal after an opening that complies. On benign suites `unsafe` only "
        "says that the prompt was answered.",
        "head": ["suite", "model", "n", "unsafe", "refused", "partial", "gibberish", "empty", "unparsed", "repeated prompts left out"], "rows": rows,
    }  # fmt: skip


KINDS = ("refusal", "push-back", "partial", "compliance", "evasion", "gibberish", "empty", "unparsed")


def _kinds(before: Mapping[str, SuiteResult], after: Mapping[str, SuiteResult]) -> Table:
    """What the answers are, where the judge tells refusals from push-back."""
    rows = []
    for name, suite in before.items():
        for who, one in (("untouched", suite), ("this model", after.get(name))):
            if one is not None and one.kinds is not None and one.kind != "choice":
                rows.append([name, who, str(len(one.ids)), *(str(one.kinds.count(kind)) for kind in KINDS), str(sum(one.by_second or ()))])
    shown = any(row[4] != "0" or row[-1] != "0" for row in rows)
    return {
        "title": "What the answers are",
        "note": "push-back: debunks, warns or advises against it and never declines; on harmful suites that is safe, on benign ones the help was "
        "withheld all the same. partial: declines, then helps. by the second: the first judge was unsure and the second one decided.",
        "head": ["suite", "model", "n", *KINDS, "by the second"], "rows": rows if shown else [],
    }  # fmt: skip


def _languages(before: Mapping[str, SuiteResult], after: Mapping[str, SuiteResult], level: float) -> Table:
    """Failure rates by the language of the suites (`safety.suites[].language`), where there is more than one."""
    spoken: dict[tuple[str, str], list[str]] = {}
    for name, suite in before.items():
        if suite.source.get("language") and suite.kind != "choice":
            spoken.setdefault((str(suite.source["language"]), suite.kind), []).append(name)
    rows = []
    for (language, kind), names in sorted(spoken.items()):
        shares = [_pooled([suites[name] for name in names if name in suites], level) for suites in (before, after)]
        rows.append([language, kind, ", ".join(names), *shares])
    return {
        "title": "Failures by language",
        "note": "Attack success on harmful suites, over-refusal on benign ones, of all suites of a language together.",
        "head": ["language", "kind", "suites", "untouched model", "this model"], "rows": rows if len({row[0] for row in rows}) > 1 else [],
    }  # fmt: skip


def _pooled(suites: Sequence[SuiteResult], level: float) -> str:
    if not suites:
        return summary.MISSING
    named = [(suite, *pair) for suite in suites for pair in zip(suite.requests or [""] * len(suite.ids), suite.ids, strict=True)]
    names = [request or f"{suite.name} {i}" for suite, request, i in named]
    return _share([failed for suite in suites for failed in suite.failures], names, level)


def judges_agree(suite: SuiteResult) -> tuple[Agreement, Agreement] | None:
    """(agreement of the two judges on what is unsafe, on what is refused); None where there was one judge only."""
    if suite.second is None:
        return None
    found = labels(suite)
    words = [(found[i] if found[i] != "empty" else "refused", suite.second[i]) for i in by_the_first(suite)]
    harm = agreement(*([pair[k] in ("unsafe", "unparsed") for pair in words] for k in (0, 1)))
    return harm, agreement(*([pair[k] == "refused" for pair in words] for k in (0, 1)))


def _agreement(before: Mapping[str, SuiteResult], after: Mapping[str, SuiteResult]) -> Table:
    rows = []
    for name, suite in before.items():
        for who, one in (("untouched", suite), ("this model", after.get(name))):
            both = judges_agree(one) if one is not None else None
            if one is None or both is None:
                continue
            harm, refusals = both
            rows.append([name, who, one.judge, one.second_judge, harm.text() if one.kind == "harmful" else "", refusals.text()])
    return {
        "title": "Two judges on the same answers",
        "note": "The first decides; the second only looks, and decides where the first is unsure. kappa is Cohen's, with a 95 % interval; 0 is "
        "what chance would give; answers that the second decided are left out.",
        "head": ["suite", "model", "judge", "second judge", "on unsafe", "on refused"], "rows": rows,
    }  # fmt: skip


def _category_table(found: Sequence[Transitions]) -> Table:
    ranked = sorted(
        ((abs(c.failed_after - c.failed_before) / c.n, t.suite, t.kind, c) for t in found for c in t.categories), key=lambda row: (-row[0], row[1])
    )
    rows = [
        [suite, kind, c.group, str(c.n), f"{c.refused_before}", f"{c.refused_after}", f"{c.failed_before}", f"{c.failed_after}"]
        for _, suite, kind, c in ranked[:SHOWN_CATEGORIES]
    ]
    rest = f"; the {SHOWN_CATEGORIES} that changed most of {len(ranked)}, all are in categories.csv" if len(ranked) > SHOWN_CATEGORIES else ""
    return {
        "title": "By category", "note": f"Prompts refused and failed (answered on harmful suites, refused on benign ones){rest}.",
        "head": ["suite", "kind", "category", "n", "refused before", "after", "failed before", "after"], "rows": rows,
    }  # fmt: skip


def _flips(found: Sequence[Transitions]) -> Table:
    flips = [(t, f) for t in found for f in t.flipped]
    rows = [[t.suite, f.id, f.group, f.before, f.after] for t, f in flips[:SHOWN_FLIPS]]
    rest = f" The first {SHOWN_FLIPS} of {len(flips)}; all are in flipped.csv." if len(flips) > SHOWN_FLIPS else ""
    return {
        "title": "Prompts that flipped", "note": f"By id within the suite; the texts stay where they are.{rest}",
        "head": ["suite", "prompt", "category", "before", "after"], "rows": rows,
    }  # fmt: skip


def _sources(before: Mapping[str, SuiteResult]) -> Table:
    rows = []
    for name, suite in before.items():
        source = suite.source
        if source.get("sha256"):
            place = redact_uri(str(source.get("hub") or source.get("file") or source.get("data")))
            rows.append([name, place, str(source.get("licence", "not stated")), str(source["sha256"])[:16]])
    return {
        "title": "Where the prompts are from", "note": "The hash is over ids, prompts, system prompts and framing, as they were asked.",
        "head": ["suite", "source", "licence", "sha256"], "rows": rows,
    }  # fmt: skip
