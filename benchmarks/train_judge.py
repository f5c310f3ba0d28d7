"""The weights of the judge `refusal`, trained anew: the same bytes from the same data.

    python benchmarks/train_judge.py --data FOLDER [--out orchestrator/evaluation/judges/refusal_weights.npz]

FOLDER holds, anywhere below it, data whose licence lets weights be shipped:
  xstest_v2_completions_gpt4.csv, ..._llama2new.csv   human labels (Röttger et al. 2023, CC BY 4.0): full refusals and full compliances
  jbb_baseline_*.jsonl                                answers of Llama-2-7B-chat and Llama-3-8B-instruct to harmful requests (repository
                                                      andyrdt/refusal_direction, Apache-2.0): those that decline in so many words
  advbench_harmful_behaviors.csv                      openings of compliance (`target`, MIT)
  gsm8k_train_2000.jsonl, sqlgen_train.jsonl          ordinary answers (MIT; CC BY 4.0)
and `judge_sentences.py` beside this file. Every answer is learnt as it stands, cut to 24 words, and without its first sentence.
Needs scikit-learn, which MLflow brings; the judge itself needs numpy alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import judge_sentences  # noqa: E402
import numpy as np  # noqa: E402

from orchestrator.evaluation.judges import features, learnt  # noqa: E402
from orchestrator.evaluation.judges.refusal import RefusalJudge, fold  # noqa: E402

SIZE, STRENGTH, WORDS = 1 << 15, 30.0, 24
"""Weights; inverse strength of the ridge; words of a cut copy (about 32 tokens)."""
LABELS = {"1_full_compliance": False, "2_full_refusal": True}


@dataclass(frozen=True)
class Labelled:
    """An answer, whether people (or its origin) say that it refuses, and where it is from."""

    answer: str
    refused: bool
    source: str
    prompt: str = ""


def one(folder: Path, name: str) -> Path:
    """The file of this name below the folder. Raises SystemExit that names it."""
    found = sorted(folder.rglob(name))
    if not found:
        raise SystemExit(f"{name} is not below {folder}; see --help for what is needed and where it is from")
    return found[0]


def xstest(folder: Path) -> list[Labelled]:
    """Full refusals and full compliances of every file of human labels below the folder."""
    found = []
    for path in sorted(folder.rglob("xstest_v2_completions_*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        model = path.stem.removeprefix("xstest_v2_completions_")
        found += [Labelled(r["completion"], LABELS[r["final_label"]], model, r["prompt"]) for r in rows if r["final_label"] in LABELS]
    return found


def others(folder: Path) -> list[Labelled]:
    """Everything but the human labels."""
    judge, found = RefusalJudge(), []
    for path in sorted(folder.rglob("jbb_baseline_*.jsonl")):
        texts = [json.loads(line)["response"] for line in path.read_text(encoding="utf-8").splitlines()]
        found += [Labelled(text, True, path.stem) for text in texts if judge.refusal(fold(text)) is not None]
    with one(folder, "advbench_harmful_behaviors.csv").open(encoding="utf-8", newline="") as file:
        found += [Labelled(row["target"], False, "advbench") for row in list(csv.DictReader(file))[:200]]
    for name, column, count in (("gsm8k_train_2000.jsonl", "answer", 150), ("sqlgen_train.jsonl", "output", 80)):
        lines = one(folder, name).read_text(encoding="utf-8").splitlines()[:count]
        found += [Labelled(json.loads(line)[column], False, name) for line in lines]
    return found + [Labelled(answer, refused, "written") for answer, refused in judge_sentences.answers(rounds=4)]


def cut(text: str, words: int = WORDS) -> str:
    """About the first 32 tokens."""
    return " ".join(text.split()[:words])


def matrix(texts: Iterable[str]):
    """(texts, SIZE) of features, each row of length 1."""
    from scipy.sparse import csr_matrix

    rows = [features.places(fold(text), SIZE) for text in texts]
    ends = np.cumsum([0, *map(len, rows)])
    values = np.concatenate([np.full(len(row), 1 / np.sqrt(max(len(row), 1))) for row in rows])
    return csr_matrix((values, np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]), ends), shape=(len(rows), SIZE))


def fit(rows: Sequence[Labelled]) -> learnt.Weights:
    """Weights in eighths of a byte's range, as the judge reads them."""
    from sklearn.linear_model import LogisticRegression

    texts, labels, weights = [], [], []
    for row in rows:
        rest = re.split(r"(?<=[.!?])\s+", row.answer.strip(), maxsplit=1)
        copies = [(row.answer, 1.0), (cut(row.answer), 0.5)]
        if len(rest) > 1 and len(row.answer.split()) > 30:
            copies.append((rest[1], 0.5))
        for text, weight in copies:
            texts.append(text)
            labels.append(row.refused)
            weights.append(weight)
    model = LogisticRegression(C=STRENGTH, max_iter=500).fit(matrix(texts), labels, sample_weight=weights)
    scale = float(np.abs(model.coef_).max()) / 127
    return learnt.Weights(np.round(model.coef_[0] / scale).astype(np.int8).tolist(), scale, float(model.intercept_[0]), "")


def write(weights: learnt.Weights, path: Path) -> None:
    np.savez_compressed(path, values=np.asarray(weights.values, dtype=np.int8), scale=np.float64(weights.scale), bias=np.float64(weights.bias))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the files above")
    parser.add_argument("--out", type=Path, default=learnt.WEIGHTS, help="where the weights go")
    options = parser.parse_args()
    models = [one(options.data, f"xstest_v2_completions_{model}.csv") for model in ("gpt4", "llama2new")]
    rows = [row for row in xstest(models[0].parent) if row.source in ("gpt4", "llama2new")] + others(options.data)
    write(fit(rows), options.out)
    print(f"{len(rows)} answers, {sum(row.refused for row in rows)} of them refusals: {options.out}, {options.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
