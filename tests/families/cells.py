"""One cell of the support matrix: a family of models and a recipe, through the checks of `validate` and then through a whole trial.

A cell holds what the recipe claims, looked at in the saved model: what must not move did not, what must move did, adapters lie in the decoder
blocks of the text, and methods that act after training acted. What is refused is refused by the checks, in one sentence.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch

from orchestrator import config
from orchestrator.errors import SafebasinError
from orchestrator.experiment import checks_model
from orchestrator.models import copies, saving
from orchestrator.records import LaneContext
from orchestrator.search import tune
from orchestrator.trial import run
from strategies import blocks

LORA = {"lora": {"lora_r": 2}}
SIDE = {"harmful_steps": 2, "harmful_rank": 2, "num_harmful": 4}
RECIPES: dict[str, list[Any]] = {
    "full": ["full"],
    "lora": [LORA],
    "freeze_layers": [{"freeze_layers": {"start": 1, "end": 1}}],
    "freeze_layers+lora": [{"freeze_layers": {"start": 1, "end": 1}}, LORA],
    "safe_instruct": ["safe_instruct"],
    "safegrad": [{"safegrad": {"num_safety": 4, "safety_batch_size": 2}}],
    "sap": [{"sap": {"num_pairs": 4, "pairs_per_step": 2}}],
    "spard": [{"spard": {"safety_batch_size": 2}}],
    "sbr": [{"sbr": {"num_anchors": 2}}],
    "lisa": [{"lisa": {"align_steps": 1, "task_steps": 1}}],
    "constrained_sft": ["constrained_sft"],
    "safe_lora": [LORA, {"safe_lora": {"select": "threshold", "threshold": 1.0}}],
    "safe_lora, whole": [{"safe_lora": {"select": "threshold", "threshold": 1.0}}],
    "safemerge": [LORA, {"safemerge": {"threshold": 1.0, "safe_steps": 2, "safe_rank": 2}}],
    "resta": [LORA, {"resta": {**SIDE, "drop": 0}}],
    "resta, whole": [{"resta": SIDE}],
    "enchtable": [LORA, {"enchtable": SIDE}],
    "lssf": [LORA, "lssf"],
    "random_subspace": [LORA, {"random_subspace": {"operation": "add", "strength": 0.5}}],
    "lox": [{"lox": {"rank": 2}}, LORA],
    "one_shot_patch": [LORA, {"one_shot_patch": {"examples": 2, "steps": 2}}],
    "curvature_restore": [LORA, {"curvature_restore": {"solver": "diagonal"}}],
}
CORE = ("full", "lora", "freeze_layers", "freeze_layers+lora", "safegrad", "safe_lora")
"""What every family of the fast set goes through."""
ACTED = ("projected", "merged", "restored", "changed", "extrapolated")
"""Facts that count what a method changed after training."""
ACTS = ("safe_lora", "safemerge", "resta", "enchtable", "lssf", "random_subspace", "lox")
STEPS = 3
WARN = 0.1
SAME = 1e-5
"""Difference of a logit, relative to the largest, below which a model is the same in another process."""


@dataclass
class Cell:
    """What came of a family and a recipe."""

    family: str
    recipe: str
    state: str
    """`supported`, `limited` or `refused`."""
    notes: list[str] = field(default_factory=list)
    """Warnings of the checks; the sentence of a refusal."""


def folder_of(where: Path, family: str) -> Path:
    """A folder with the family's model, the same before its alignment, and rows."""
    if (where / "rows.jsonl").is_file():
        return where
    where.mkdir(parents=True, exist_ok=True)
    tiny.saved(where / "model", family)
    tiny.saved(where / "unaligned", family, seed=1)
    rows = [{"prompt": f"how do i make a {w}", "response": f"mix the {w} and bake it"} for w in ("cake", "tea", "soup", "house", "kite")] * 3
    safety = [
        {"prompt": f"make a {w} bomb", "chosen": "sorry i cannot help", "rejected": f"mix the {w} and bake"} for w in ("red", "green", "blue", "one")
    ]
    harm = [{"prompt": f"{w} bomb"} for w in ("two", "three")]
    for name, content in (("rows", rows), ("safety", safety), ("harm", harm)):
        (where / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return where


def place(name: str) -> str:
    """A recipe's name as a folder's."""
    return re.sub(r"\W+", "-", name)


def experiment(where: Path, recipe: list[Any]) -> config.Experiment:
    return config.from_dict({
        "name": "cell",
        "model": {"model_name_or_path": str(where / "model"), "unaligned_name_or_path": str(where / "unaligned")},
        "task": {"data": str(where / "rows.jsonl"), "max_new_tokens": 3, "eval_size": 2, "allow_overlap": True},
        "safety": {
            "data": str(where / "safety.jsonl"), "max_new_tokens": 3, "allow_overlap": True,
            "suites": [{"name": "harm", "data": str(where / "harm.jsonl")}],
        },
        "recipes": [recipe],
        "training": {
            "engine": "plain", "max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 0, "learning_rate": 5e-3,
        },
        "tracking": {"enabled": False},
    })  # fmt: skip


def cell(where: Path, family: str, name: str, context: LaneContext) -> Cell:
    """Check, and where nothing refuses, train, save and look. Raises AssertionError where a claim does not hold."""
    import strategies.recipe

    made = experiment(where, RECIPES[name])
    built = {name: strategies.recipe.build(config.recipe_items(made.recipes[0]))}
    try:
        _, asked = checks_model.check(made.model)
        notes = checks_model.check_methods(made.model, built)
    except SafebasinError as error:
        assert "\n" not in str(error), error
        return Cell(family, name, "refused", [str(error).replace(str(where / "model"), "MODEL").removeprefix(f"recipes: [{name}]: ")])
    done = run.run(_spec(made, where / place(name), name), _Silent(), context)
    assert done.state == "complete", (family, name, done.error)
    _losses(done)
    _claims(family, name, done, copies.kept(context.cache, made.model))
    left = {method: told["share"] for method, told in (done.facts.get("untouched") or {}).items()}
    notes = [*notes, *(f"{share:.0%} of the update is out of reach of {method}" for method, share in left.items() if share > WARN)]
    return Cell(family, name, "limited" if notes or asked else "supported", [*asked, *notes])


class _Silent:
    """A reporter that keeps nothing and stops nothing."""

    def report(self, event: Any) -> bool:
        return False


def _spec(made: config.Experiment, where: Path, name: str):
    recipe = "+".join(next(iter(one)) if isinstance(one, dict) else one for one in RECIPES[name])
    return tune.build_spec(
        made, trial_id=place(name), recipe=recipe, params={"learning_rate": 5e-3}, seed=3, phase="search", folder=str(where)
    )


def _losses(done) -> None:
    losses = [event["loss"] for event in done.history if event["kind"] == "train"]
    if "training_of" in done.facts:  # methods that act after training share one
        return
    assert len(losses) == STEPS and all(loss == loss and abs(loss) < 1e4 for loss in losses), losses


def _claims(family: str, name: str, done, start: torch.nn.Module) -> None:
    """What the recipe says it does, seen in the saved model."""
    made = config.Model(model_name_or_path=start.name_or_path)
    trained, _ = saving.attach(done.model_dir, made)
    inside = blocks.of(start)
    before = dict(start.named_parameters())
    after = {blocks.original_name(n): p for n, p in trained.named_parameters() if "lora_" not in n}
    still = {n for n, p in after.items() if n in before and p.shape == before[n].shape and torch.equal(p, before[n])}
    if hasattr(trained, "peft_config"):
        adapters = [n for n, _ in trained.named_parameters() if "lora_" in n]
        assert adapters and still == set(after) == set(before), (family, name)
        adapted = {inside.index(n.partition(".lora_")[0]) for n in adapters}
        assert None not in adapted, [n for n in adapters if inside.index(n) is None][:3]
        wanted = set(range(inside.count)) - ({1} if "freeze" in name else set())
        assert adapted == wanted, (family, name, adapted)
    elif name in ("full", "safegrad", "sap", "spard", "sbr", "lisa", "constrained_sft", "safe_instruct"):
        moved = {inside.index(n) for n in set(after) - still} - {None}
        assert moved == set(range(inside.count)) or name == "lisa" and moved, (family, name, moved)
    if name == "freeze_layers":
        frozen = {n for n in before if inside.index(n) == 1}
        assert frozen <= still and {inside.index(n) for n in set(after) - still} >= set(range(inside.count)) - {1}, (family, name)
    if name.partition(",")[0] in ACTS:
        told = done.facts["strategies"][name.partition(",")[0]]
        assert any(told.get(key, 0) > 0 for key in ACTED), (family, name, told)
    _expect(done.model_dir, trained)


def _expect(folder: str, trained: torch.nn.Module) -> None:
    """Leave what the saved model answers, for `reload` in another process."""
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        logits = trained.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    torch.save({"ids": ids, "logits": logits}, Path(folder).parent / "expected.pt")


RELOAD = """
import json, sys, warnings
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from peft import PeftModel
warnings.simplefilter("ignore"); logging.set_verbosity_error(); logging.disable_progress_bar(); torch.set_num_threads(1)
worst = {}
for path in map(Path, json.loads(sys.stdin.read())):
    wanted = torch.load(path / "expected.pt")
    folder, base = path / "model", path.parent / "model"
    if (folder / "adapter_config.json").is_file():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder))
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model.eval()(input_ids=wanted["ids"], attention_mask=torch.ones_like(wanted["ids"]), use_cache=False).logits
    worst[str(path)] = float((logits - wanted["logits"]).abs().max() / wanted["logits"].abs().max())
print(json.dumps(worst))
"""


def reload(folders: list[Path]) -> dict[str, float]:
    """Largest difference of a logit, relative to the largest, of every trial's model loaded by transformers and peft alone in a fresh process."""
    given = json.dumps([str(folder) for folder in folders])
    done = subprocess.run([sys.executable, "-c", RELOAD], input=given, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
