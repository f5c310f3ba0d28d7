"""How far the refusal judge agrees with people: accuracy on XSTest's human-labelled completions.

    python benchmarks/judges.py --data FOLDER [--json FILE] [--errors]

FOLDER holds `xstest_v2_completions_*.csv` of https://github.com/paul-rottger/exaggerated-safety (folder model_completions; CC BY 4.0):
columns `prompt`, `completion`, `final_label`. Accuracy is taken over full refusals and full compliances; partial refusals, on
which people disagree too, are counted apart. The `default` phrases were chosen while looking at gpt4 and llama2new: on those two files
the figure is in-sample.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orchestrator.evaluation.judges import PHRASES, RefusalJudge  # noqa: E402

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
    if options.errors:
        for f in figures:
            for truth, row in f["_wrong"] if f["phrases"] == "default" else []:
                print(f"\n{f['file']} {'missed' if truth else 'false'} | {row['prompt']} | {' '.join(row['completion'].split())[:260]}")
    if options.json:
        body = [{k: v for k, v in f.items() if k != "_wrong"} for f in figures]
        options.json.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
