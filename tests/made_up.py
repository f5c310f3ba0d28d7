"""Made-up but realistic results of an experiment, for tests of what is written about them."""

from __future__ import annotations

import random
from pathlib import Path

from orchestrator import config
from orchestrator.config import Experiment
from orchestrator.decision import limits as constraint
from orchestrator.decision.limits import Judgement
from orchestrator.records import SuiteResult, TaskResult, TrialResult, TrialSpec

TOPICS = 60
RECIPES = ("full", "lora", "freeze_layers+lora", "safe_instruct", "safegrad")
# mean score, extra unsafe answers at learning rate 1, spread
BEHAVIOUR = {
    "full": (0.93, 0.5),
    "lora": (0.9, 0.3),
    "freeze_layers+lora": (0.84, 0.12),
    "safe_instruct": (0.91, 0.012),
    "safegrad": (0.92, 0.01),
}


def experiment(folder: Path, **sections) -> Experiment:
    """The default experiment with its output in `folder` and no data that must be built."""
    raw = {
        "name": "pocket",
        "task": {"data": str(_rows(folder / "task.jsonl"))},
        "safety": {
            "data": None,
            "suites": [
                {"name": "harmful", "data": str(_rows(folder / "harmful.jsonl")), "kind": "harmful", "group_column": "topic"},
                {"name": "borderline", "data": str(_rows(folder / "borderline.jsonl")), "kind": "benign", "group_column": "topic"},
            ],
        },
        "output": {"dir": str(folder / "out")},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    return config.from_dict(raw)


def _rows(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"prompt": "a", "response": "b", "topic": "t"}\n')
    return path


def suite(name: str, kind: str, share: float, n: int, rng: random.Random) -> SuiteResult:
    failures = [rng.random() < share for _ in range(n)]
    other = [not failed if kind == "harmful" else False for failed in failures]
    groups = [f"topic {i % TOPICS}" for i in range(n)]
    unsafe, refused = (failures, other) if kind == "harmful" else (other, failures)
    return SuiteResult(name, kind, [f"{name}-{i}" for i in range(n)], groups, unsafe, refused)


def result(
    trial_id: str, recipe: str, params: dict, *, seed=0, phase="search", state="complete", score=0.9, asr=0.02, over=0.05, n=300
) -> TrialResult:
    """One trial with the wanted rates (in expectation), probes and losses."""
    rng = random.Random(f"{trial_id} {seed}")
    made = TrialResult(trial_id, recipe, params, seed, phase, state, steps=120, model_dir=f"trials/{trial_id}/model")
    made.seconds = {"setup": 0.4, "train": 11.0 + rng.random() * 5, "evaluate": 4.2, "save": 0.1, "total": 16.0 + rng.random() * 5}
    made.facts = {"trainable_parameters": 51_200, "parameters": 410_000, "peak_memory_mb": 812.5}
    for step in range(10, 121, 10):
        made.history.append(
            {
                "kind": "train",
                "time": 1.7e9 + step,
                "step": step,
                "steps": 120,
                "loss": 2.0 * 0.98**step + rng.random() * 0.05,
                "learning_rate": 1e-3,
                "grad_norm": 0.8,
            }
        )
        if phase != "baseline" and step % 30 == 0 and step < 120:
            rise = round(max(0.0, asr - 0.02) * step / 120 * 50) / 50
            made.history.append(
                {
                    "kind": "probe",
                    "time": 1.7e9 + step,
                    "step": step,
                    "n": 50,
                    "asr": 0.02 + rise,
                    "degradation": rise,
                    "breach": rise > 0.05,
                }
            )
    if state == "complete":
        scores = [float(rng.random() < score) for _ in range(200)]
        made.task = TaskResult("exact_match", sum(scores) / len(scores), scores, [f"row-{i}" for i in range(200)])
        made.suites = {"harmful": suite("harmful", "harmful", asr, n, rng), "borderline": suite("borderline", "benign", over, n, rng)}
    else:
        made.error = "NonFiniteLossError: the loss became nan at step 40; lower training.learning_rate or set training.max_grad_norm"
    return made


def baseline() -> TrialResult:
    return result("baseline", "", {}, phase="baseline", score=0.05, asr=0.01, over=0.04)


def spec(trial: TrialResult, **changes) -> TrialSpec:
    fields = {"strategies": ((trial.recipe, {}),), "training": {}, "experiment": {}, "dir": f"trials/{trial.trial_id}"}
    fields |= {name: getattr(trial, name) for name in ("trial_id", "recipe", "params", "seed", "phase")}
    return TrialSpec(**(fields | changes))


def trials(limits: config.Limits, *, count: int = 15, good: bool = True) -> tuple[TrialResult, list[tuple[TrialResult, Judgement]]]:
    """(baseline, judged trials): three of each recipe, one failed; with `good`, the feasible ones are confirmed on a second seed."""
    rng = random.Random(7)
    before, made = baseline(), []
    for i in range(count):
        recipe = RECIPES[i % len(RECIPES)]
        rate = 10 ** rng.uniform(-3.3, -2.0)
        score, harm = BEHAVIOUR[recipe]
        harm = (harm if good else harm + 0.2) * (rate / 2e-3)
        params = {"learning_rate": rate}
        if "lora" in recipe:
            params["lora.lora_r"] = rng.choice([4, 8, 16])
        if recipe.startswith("freeze"):
            params |= {"freeze_layers.start": 1, "freeze_layers.end": rng.choice([2, 3])}
        if recipe == "safegrad":
            params["safegrad.rho"] = round(rng.uniform(0.2, 1.5), 3)
        state = "failed" if i == 5 else "complete"
        score = min(0.99, score * (1 - 0.25 * abs(rng.gauss(0, 0.5))))
        made.append(
            result(f"t{i:04d}", recipe, params, state=state, score=score, asr=min(0.95, 0.005 + harm), over=0.05 + 0.02 * rng.random())
        )
    judged = [(t, constraint.judge(t, before, limits)) for t in made]
    if good:
        for trial, verdict in list(judged):
            if verdict.verdict == "feasible" and trial.recipe in ("safegrad", "safe_instruct"):
                again = result(f"{trial.trial_id}s1", trial.recipe, trial.params, seed=1, phase="confirm", score=trial.task.score, asr=0.02)
                judged.append((again, constraint.judge(again, before, limits)))
    return before, judged
