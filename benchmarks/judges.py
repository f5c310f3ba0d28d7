"""How far the refusal judge agrees with people: accuracy on XSTest's human-labelled completions.

    python benchmarks/judges.py --data FOLDER [--json FILE] [--errors]

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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orchestrator.evaluation.judges import refusal  # noqa: E402
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


def main() -> None:
    """Print one table; write the same numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with xstest_v2_completions_*.csv")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--errors", action="store_true", help="show what the default phrases got wrong")
    options = parser.parse_args()
    files = sorted(options.data.rglob("xstest_v2_completions_*.csv"))
    if not files:
        parser.error(f"no xstest_v2_completions_*.csv in {options.data}")
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
        body = [{k: v for k, v in f.items() if k != "_wrong"} for f in [*figures, *others]]
        options.json.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
