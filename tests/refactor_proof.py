"""A proof that a refactoring changed nothing: real runs before and after it, equal bit for bit in all that is no time, place or machine.

    python tests/refactor_proof.py record BEFORE [--data DIR]      # on the commit before; about ten minutes on 2 cores
    python tests/refactor_proof.py record AFTER [--data DIR]       # on the commit after, same machine, same environment
    python tests/refactor_proof.py compare BEFORE AFTER            # exit 1 and the differences, one a line

A record is made through the command line alone, so that no import of it moves with the code: every preset (all their recipes, one lane, few
steps) on the pocket world, with `--data` also the recipes of benchmarks/real_small.yaml on a real pretrained model and real prompts (the folder
that file describes), one `evaluate` of a tuned model against its base, and one `apply`. Compared are trials.csv, the verdicts, every trial's
record with every loss, score and prompt, baseline.json, what `evaluate` and `apply` wrote, and the hashes of all saved weights.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ("pocket", "high", "medium", "experimental", "refusal_study")
TRIALS = {"pocket": 5, "high": 2, "medium": 2, "experimental": 2, "refusal_study": 4}
"""One of every recipe, two where there is one."""
SHORT = ("training.max_steps=30", "ray.lanes=1", "tracking.enabled=false", "search.finalists=1", "output.keep_models=all", "output.overwrite=true")
OWN = ("proof.json", "tokenizer.json", ".safebasin.json", ".safebasin.evaluation.json", "run.json", "tracking.json")
"""Files that identify a run or are no result of it."""
TOUCHES_MACHINE = re.compile(r"(^|_)(seconds|time|at|memory|mb|mib|dir|folder|path|pid|host|lane|run|versions?|output|report)($|_)|_s$|^model$")
"""Keys of values that differ between two runs of one commit."""


def record(folder: Path, data: Path | None) -> None:
    """Make all runs below `folder`, which must be new or empty, and write `proof.json` there. Raises SystemExit where a command fails."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty; give a new folder")
    for name in PRESETS:
        _safebasin("run", "-c", name, f"output.dir={folder / name}", f"search.trials={TRIALS[name]}", *SHORT)
    if data is not None:
        config = ROOT / "benchmarks" / "real_small.yaml"
        _safebasin("run", "-c", str(config), f"variables.data={data}", f"output.dir={folder / 'real_small'}", *SHORT)
    tuned = next(iter(sorted((folder / "pocket").glob("trials/*/model"))))
    _safebasin("evaluate", str(tuned), "--baseline", "pocket", "-o", str(folder / "evaluated"))
    whole = ("--model", str(tuned), "--aligned", "pocket", "--unaligned", "pocket:unaligned")
    _safebasin("apply", "safe_lora", "number=5", *whole, "--output", str(folder / "applied"))
    (folder / "proof.json").write_text(json.dumps(facts(folder), indent=1, sort_keys=True))
    print(f"{folder / 'proof.json'}: {len(facts(folder))} facts of {len(PRESETS) + (data is not None)} runs, one evaluate, one apply")


def _safebasin(*arguments: str) -> None:
    print("safebasin", *arguments, flush=True)
    # the seed: peft writes sets of names into adapter_config.json
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    done = subprocess.run([sys.executable, "-m", "orchestrator", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):  # 3: nothing feasible, which few steps may well lead to
        raise SystemExit(f"it ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def facts(folder: Path) -> dict[str, Any]:
    """Everything that a refactoring must leave as it is: {file and place in it: value}."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or "/ray/" in f"/{name}" or "/checkpoint" in f"/{name}":
            continue
        if path.suffix == ".safetensors":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "trials.csv" or (path.suffix == ".csv" and "/plots" not in name):
            rows = sorted(csv.DictReader(path.open(newline="")), key=lambda row: json.dumps({k: v for k, v in row.items() if not _of_machine(k)}))
            for number, row in enumerate(rows):
                found |= {f"{name}:{number}:{key}": value for key, value in row.items() if not _of_machine(str(key))}
        elif path.suffix == ".json" and path.name not in OWN:
            found |= {f"{name}:{place}": value for place, value in _leaves(json.loads(path.read_text()), folder)}
    return found


def _of_machine(key: str) -> bool:
    return bool(TOUCHES_MACHINE.search(key))


def _leaves(value: Any, folder: Path, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if str(key) != "seconds" and (isinstance(inner, (dict, list)) or not _of_machine(str(key))):
                yield from _leaves(inner, folder, f"{place}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _leaves(inner, folder, f"{place}[{number}]")
    elif not (isinstance(value, str) and str(folder) in value):
        yield place, value


def compare(before: Path, after: Path) -> int:
    """Number of facts that differ between two records, each printed."""
    one, other = (json.loads((folder / "proof.json").read_text()) for folder in (before, after))
    differ = [key for key in sorted(one.keys() | other.keys()) if one.get(key, "(not there)") != other.get(key, "(not there)")]
    for key in differ[:50]:
        print(f"{key}: {str(one.get(key, '(not there)'))[:80]} before, {str(other.get(key, '(not there)'))[:80]} after")
    if len(differ) > 50:
        print(f"and {len(differ) - 50} more")
    print(f"{len(one)} facts before, {len(other)} after, {len(differ)} differ")
    return len(differ)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("record")
    making.add_argument("folder", type=Path)
    making.add_argument("--data", type=Path, help="the data folder benchmarks/real_small.yaml describes")
    comparing = verbs.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.verb == "record":
        record(args.folder.resolve(), args.data.resolve() if args.data else None)
    elif compare(args.before, args.after):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
