"""How far the refusal judges agree with people: accuracy on XSTest's human-labelled completions.

    python benchmarks/judges.py --data FOLDER [--json FILE] [--errors]

First the learnt judge (`refusal`), cross-validated by model *and* by prompt: each file's answers are judged by weights that saw neither that
model's labels nor those prompts' (the files share their 450 prompts): as they stand, cut to 24 words (about 32 tokens), and after a block of
thoughts. `alone`: outside its band; `with phrases`: `refusal_phrases` decides inside it, as the default second judge does. FOLDER also holds what
`train_judge.py` names; without it this table is left out and said so. Then other languages (answers written by us) and what is
called refused among openings of compliance. Then the phrase lists:

FOLDER holds `xstest_v2_completions_*.csv` of https://github.com/paul-rottger/exaggerated-safety (folder model_completions; CC BY 4.0):
columns `prompt`, `completion`, `final_label`. Accuracy is taken over full refusals and full compliances; partial refusals, on
which people disagree too, are counted apart. The `default` phrases were chosen while looking at gpt4 and llama2new: on those two files
the figure is in-sample. The second table is the honest neighbour of it: of the default's patterns only those that find a refusal in one
file are kept, and the other file is judged by them, so no phrase counts that only the file under test could have suggested. (How
patterns were worded, and what they exclude, was still decided with both in view.)
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

sys.path.insert(0, str(Path(__file__).resolve().parent))

import judge_languages  # noqa: E402
import train_judge  # noqa: E402

from orchestrator.evaluation import thinking  # noqa: E402
from orchestrator.evaluation.judges import learnt, refusal  # noqa: E402
from orchestrator.evaluation.judges.registry import PHRASES, RefusalJudge  # noqa: E402

LABELS = {"1_full_compliance": False, "2_full_refusal": True}


def measure(path: Path, phrases: str) -> dict:
    """Agreement of one phrase list with the labels of one file."""
    rows = list(csv.DictReader(path.open(encoding="utf-8", newline="")))
    verdicts = RefusalJudge(phrases).judge([r["prompt"] for r in rows], [r["completion"] for r in rows])
    pairs = [(LABELS[r["final_label"]], v.refused, r) for r, v in zip(rows, verdicts, strict=True) if r["final_label"] in LABELS]
    partial = [v.refused for r, v in zip(rows, verdicts, strict=True) if r["final_label"] == "3_partial_refusal"]
    wrong = [(truth, row) for truth, said, row in pairs if truth != said]
    return {
        "file": path.name,
        "phrases": phrases,
        "n": len(pairs),
        "accuracy": 1 - len(wrong) / len(pairs),
        "missed_refusals": sum(truth for truth, _ in wrong),
        "false_refusals": sum(not truth for truth, _ in wrong),
        "partial_n": len(partial),
        "partial_called_refused": sum(partial),
        "_wrong": wrong,
    }


def branches(pattern: str) -> list[str]:
    """The alternatives of a pattern at its outermost level."""
    found, depth, start = [], 0, 0
    for i, character in enumerate(pattern):
        depth += (character == "(") - (character == ")")
        if character == "|" and not depth:
            found.append(pattern[start:i])
            start = i + 1
    return [*found, pattern[start:]]


def default_patterns() -> list[tuple[re.Pattern[str], bool]]:
    """The default list taken apart: (pattern, whether it must stand at the beginning)."""
    found = [(b, True) for b in (*branches(refusal._START), refusal._AS_AN_AI)] + [(b, False) for b in branches(refusal._CANNOT)]
    return [(re.compile(b), first) for b, first in found]


def openings(path: Path) -> list[tuple[str, bool]]:
    """(opening as the default list sees it, whether people call it a refusal) of the rows with a full label."""
    found = []
    for row in csv.DictReader(path.open(encoding="utf-8", newline="")):
        if row["final_label"] in LABELS:
            opening = refusal.fold(row["completion"]).lower()[: refusal.WINDOW]
            start = refusal._SYMPATHETIC.match(opening)
            found.append((opening[start.end() :] if start else opening, LABELS[row["final_label"]]))
    return found


def crossed(learnt: Path, judged: Path) -> dict:
    """Accuracy on one file of those default patterns that find a refusal in the other."""
    rows, patterns = openings(judged), default_patterns()

    def says(pattern: tuple[re.Pattern[str], bool], text: str) -> bool:
        return bool(pattern[0].match(text) if pattern[1] else pattern[0].search(text))

    whole = [any(says(p, text) for p in patterns) for text, _ in rows]
    assert whole == [refusal._match_default(text, refusal.WINDOW) is not None for text, _ in rows], "the parts are not the whole"
    kept = [p for p in patterns if any(truth and says(p, text) for text, truth in openings(learnt))]
    said = [any(says(p, text) for p in kept) for text, _ in rows]
    return {
        "patterns_from": learnt.name, "file": judged.name, "kept": len(kept), "patterns": len(patterns), "n": len(rows),
        "accuracy": sum(a == truth for a, (_, truth) in zip(said, rows, strict=True)) / len(rows),
        "missed_refusals": sum(truth and not a for a, (_, truth) in zip(said, rows, strict=True)),
        "false_refusals": sum(a and not truth for a, (_, truth) in zip(said, rows, strict=True)),
    }  # fmt: skip


FOLDS = 4
THOUGHT = "<think>The user asks for something. I cannot help with everything, but let me see what is right here.</think>"
FORMS = {"as it stands": lambda text: text, "24 words": train_judge.cut, "after thoughts": lambda text: thinking.split(THOUGHT + text).said}


def cross_validated(folder: Path) -> list[dict]:
    """Agreement of weights that saw neither the model's labels nor the prompts'."""
    rows, rest, found = train_judge.xstest(folder), train_judge.others(folder), []
    prompts = sorted({row.prompt for row in rows})
    fold = {prompt: i % FOLDS for i, prompt in enumerate(prompts)}
    phrases = RefusalJudge()
    for model in sorted({row.source for row in rows}):
        said: dict[str, list[tuple[bool, float, bool]]] = {form: [] for form in FORMS}
        for part in range(FOLDS):
            weights = train_judge.fit([row for row in rows if row.source != model and fold[row.prompt] != part] + rest)
            for row in (row for row in rows if row.source == model and fold[row.prompt] == part):
                for form, shown in FORMS.items():
                    text = refusal.fold(shown(row.answer))
                    said[form].append((row.refused, weights.chance(text), phrases.refusal(text) is not None))
        found += [{"table": "cross-validated", "model": model, "form": form, **agreement(seen)} for form, seen in said.items()]
    return found


def agreement(said: list[tuple[bool, float, bool]]) -> dict:
    """(people, chance, phrases) of answers -> figures outside the band, and with the phrases inside it."""
    low, high = learnt.BAND
    decided = [(truth, chance >= high) for truth, chance, _ in said if not low < chance < high]
    whole = [(truth, chance >= high or (chance > low and declined)) for truth, chance, declined in said]
    figures = {"n": len(said), "abstained": 1 - len(decided) / len(said)}
    for name, pairs in (("alone", decided), ("with phrases", whole)):
        refusals, others = [told for truth, told in pairs if truth], [told for truth, told in pairs if not truth]
        figures |= {
            f"{name}: accuracy": sum(truth == told for truth, told in pairs) / len(pairs), f"{name}: seen": sum(refusals) / len(refusals),
            f"{name}: false": sum(others) / len(others), f"{name}: rate error": sum(told - truth for truth, told in pairs) / len(pairs),
        }  # fmt: skip
    return figures


def by_language() -> list[dict]:
    """Declines seen and helpful answers called refused, by language; answers in unknown languages that were left undecided."""
    judge, found = learnt.LearntRefusalJudge(), []
    for language, (declines, helps) in judge_languages.ANSWERS.items():
        seen, false = (judge.judge(texts, texts) for texts in (declines, helps))
        found.append({"table": "languages", "language": language, "declines": len(declines), "seen": sum(v.refused for v in seen) / len(seen),
                      "helpful": len(helps), "false": sum(v.refused or not v.parse_ok for v in false) / len(false)})  # fmt: skip
    for language, texts in judge_languages.UNKNOWN.items():
        verdicts = judge.judge(texts, texts)
        undecided = sum(not v.parse_ok for v in verdicts) / len(texts)
        found.append({"table": "unknown languages", "language": language, "n": len(texts), "undecided": undecided})
    return found


def openings_of_compliance(folder: Path) -> list[dict]:
    """AdvBench targets that training did not see, and how many answers a second are judged."""
    path = next(iter(sorted(folder.rglob("advbench_harmful_behaviors.csv"))), None)
    if path is None:
        return []
    with path.open(encoding="utf-8", newline="") as file:
        texts = [row["target"] for row in list(csv.DictReader(file))[200:]]
    judge, started = learnt.LearntRefusalJudge(), time.process_time()
    verdicts = judge.judge(texts, texts)
    seconds = time.process_time() - started
    return [{"table": "openings of compliance", "n": len(texts), "called refused": sum(v.refused for v in verdicts) / len(texts),
             "abstained": sum(not v.parse_ok for v in verdicts) / len(texts), "answers a CPU-second": len(texts) / seconds}]  # fmt: skip


def printed(rows: list[dict]) -> None:
    """Rows of one table as Markdown."""
    if rows:
        columns = [name for name in rows[0] if name != "table"]
        print(f"\n## {rows[0]['table']}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
        for row in rows:
            print("| " + " | ".join(f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name]) for name in columns) + " |")


def main() -> None:
    """Print the tables; write the same numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with xstest_v2_completions_*.csv")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--errors", action="store_true", help="show what the default phrases got wrong")
    options = parser.parse_args()
    files = sorted(options.data.rglob("xstest_v2_completions_*.csv"))
    if not files:
        parser.error(f"no xstest_v2_completions_*.csv in {options.data}")
    try:
        rows = cross_validated(options.data)
    except SystemExit as missing:
        rows = []
        print(f"the learnt judge is not cross-validated: {missing}")
    languages = by_language()
    known, unknown = ([r for r in languages if r["table"] == name] for name in ("languages", "unknown languages"))
    tables = [rows, known, unknown, openings_of_compliance(options.data)]
    for table in tables:
        printed(table)
    learnt_rows = [row for table in tables for row in table]
    print()
    figures = [measure(path, phrases) for path in files for phrases in PHRASES]
    print(f"{'file':42} {'phrases':10} {'n':>4} {'accuracy':>9} {'missed':>7} {'false':>6} {'partial called refused':>24}")
    for f in figures:
        share = f"{f['partial_called_refused']}/{f['partial_n']}"
        print(
            f"{f['file']:42} {f['phrases']:10} {f['n']:4} {f['accuracy']:9.3f} {f['missed_refusals']:7} {f['false_refusals']:6} {share:>24}"
        )
    others = [crossed(a, b) for a in files for b in files if a != b]
    if others:
        print(f"\n{'judged':42} {'patterns that find a refusal in':42} {'kept':>9} {'n':>4} {'accuracy':>9} {'missed':>7} {'false':>6}")
    for f in others:
        print(
            f"{f['file']:42} {f['patterns_from']:42} {f['kept']:>4}/{f['patterns']} {f['n']:4} {f['accuracy']:9.3f} {f['missed_refusals']:7} "
            f"{f['false_refusals']:6}"
        )
    if options.errors:
        for f in figures:
            for truth, row in f["_wrong"] if f["phrases"] == "default" else []:
                print(f"\n{f['file']} {'missed' if truth else 'false'} | {row['prompt']} | {' '.join(row['completion'].split())[:260]}")
    if options.json:
        body = [{k: v for k, v in f.items() if k != "_wrong"} for f in [*learnt_rows, *figures, *others]]
        options.json.write_text(json.dumps({"rows": body}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
