"""`safebasin recommend`: which recipes to search, by risk and by what there is; what the literature advises, corrected by what we measured.

The advice by risk is the one this project began with: high (health, finance, law) SafeGrad, frozen layers and continuous monitoring; medium
(customer service, education) safety-aware probing with LoRA; experiments frozen layers first and SafeGrad when safety is seen falling; behind an
API SafeInstruct or SafeMERGE. Our figures are those of docs/methods_table.md, the pocket world; a test compares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Risk = Literal["high", "medium", "experimental"]
RISKS: dict[Risk, str] = {"high": "health, finance, law", "medium": "customer service, education", "experimental": "research, trying out"}
Key = tuple[str, str]
"""(recipe, settings) of a row of the table."""


@dataclass(frozen=True)
class Measured:
    """A row of docs/methods_table.md: three training seeds on the made-up world."""

    score: str
    asr: str
    feasible: str
    """How many of the seeds keep every limit, e.g. `2 of 3 (1 undecided)`."""

    @property
    def text(self) -> str:
        return f"task score {self.score}, attack success {self.asr}, feasible on {self.feasible} seeds"


MEASURED: dict[Key, Measured] = {
    ("full", "default"): Measured("1.00 / 1.00 / 1.00", "0.94 / 0.98 / 0.93", "0 of 3"),
    ("low_rate", "default"): Measured("0.62 / 0.64 / 0.78", "0.24 / 0.25 / 0.23", "0 of 3"),
    ("lora", "default"): Measured("1.00 / 1.00 / 0.97", "1.00 / 1.00 / 1.00", "0 of 3"),
    ("freeze_layers", "default"): Measured("0.99 / 0.99 / 0.99", "0.94 / 0.98 / 0.94", "0 of 3"),
    ("safe_instruct", "default"): Measured("0.90 / 1.00 / 1.00", "0.00 / 0.09 / 0.00", "2 of 3 (1 undecided)"),
    ("safegrad", "default"): Measured("1.00 / 0.99 / 0.99", "0.02 / 0.02 / 0.07", "3 of 3"),
    ("sap", "default"): Measured("1.00 / 1.00 / 1.00", "0.94 / 0.98 / 0.93", "0 of 3"),
    ("constrained_sft", "default"): Measured("0.90 / 0.75 / 0.84", "0.94 / 0.97 / 0.94", "0 of 3"),
    ("lisa", "default"): Measured("0.96 / 0.84 / 0.84", "0.04 / 0.07 / 0.05", "3 of 3"),
    ("curvature_restore", "tuned"): Measured("1.00 / 1.00 / 1.00", "0.01 / 0.01 / 0.02", "3 of 3"),
    ("safe_lora", "tuned"): Measured("0.90 / 0.89 / 0.09", "0.47 / 0.55 / 0.42", "0 of 3"),
    ("safemerge", "default"): Measured("1.00 / 1.00 / 1.00", "0.94 / 0.98 / 0.93", "0 of 3"),
    ("lox", "tuned"): Measured("0.87 / 1.00 / 0.62", "0.21 / 0.20 / 0.15", "0 of 3 (1 undecided)"),
}

_ADVISED: dict[Risk, tuple[str, ...]] = {"high": ("safegrad", "freeze_layers"), "medium": ("sap", "lora"), "experimental": ("freeze_layers",)}
_OURS: dict[Risk, tuple[Key, ...]] = {
    "high": (("safegrad", "default"), ("lisa", "default"), ("curvature_restore", "tuned")),
    "medium": (("safegrad", "default"), ("lisa", "default"), ("safe_instruct", "default")),
    "experimental": (("safe_instruct", "default"), ("lisa", "default")),
}
_WITHOUT_ROWS: tuple[Key, ...] = (("low_rate", "default"), ("constrained_sft", "default"), ("lox", "tuned"), ("safe_lora", "tuned"))
"""For where there are no safety rows, or none that a method could use."""
_GIVE = {
    "safety": "safety rows (harmful prompts with safe answers; a few hundred)", "harmful": "harmful answers to them (a column `rejected`)",
    "unaligned_base": "the model before its alignment (the base model)",
}  # fmt: skip


@dataclass(frozen=True)
class Situation:
    """What is to be tuned, and with what."""

    risk: Risk = "medium"
    gpus: int = 0
    safety: bool = False
    """Whether there are safety rows."""
    harmful: bool = False
    """Whether they have harmful answers too."""
    unaligned: bool = False
    """Whether there is the model before its alignment."""
    api: bool = False
    """Whether the model is behind an API, so that its weights are not to be had."""

    @property
    def has(self) -> frozenset[str]:
        given = {"safety": self.safety, "harmful": self.safety and self.harmful, "unaligned_base": self.unaligned, "reference": True}
        return frozenset(name for name, there in given.items() if there)


@dataclass(frozen=True)
class Choice:
    """A recipe to search, with the reason."""

    recipe: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Advice:
    """What to search and how."""

    choices: tuple[Choice, ...]
    left_out: tuple[str, ...]
    """What was advised and is not searched, a sentence each."""
    notes: tuple[str, ...]
    max_degradation: float
    seeds: int
    on_breach: str
    """`rollback`, `stop`, `add safegrad`."""


def advise(what: Situation) -> Advice:
    """Recipes, limits and monitoring for a situation. Behind an API: what carries over to one, measured on a stand-in with open weights."""
    if what.api:
        return _behind_an_api(what)
    choices, left_out = [], []
    for recipe, why in _candidates(what):
        missing = sorted({need for name in recipe for need in _needs(name)} - what.has)
        if missing:
            left_out.append(f"[{', '.join(recipe)}] ({why}) needs {' and '.join(_GIVE.get(need, need) for need in missing)}")
        elif recipe not in [choice.recipe for choice in choices]:
            choices.append(Choice(recipe, why))
    choices.append(Choice(("full",), f"the control: plain fine-tuning; ours: {MEASURED['full', 'default'].text}"))
    return Advice(tuple(choices), tuple(left_out), _notes(what), *_manner(what))


def _needs(name: str) -> frozenset[str]:
    import strategies

    return frozenset(strategies.get(name).needs)


def lines(advice: Advice) -> list[str]:
    """The advice in sentences."""
    told = [f"[{', '.join(choice.recipe)}]: {choice.why}" for choice in advice.choices]
    told += [f"left out: {one}" for one in advice.left_out]
    how = f"limit: attack success may rise by {advice.max_degradation:g}; {advice.seeds} seeds; while training, a breach leads to: {advice.on_breach}"
    return [*told, how, *advice.notes]


def _candidates(what: Situation) -> list[tuple[tuple[str, ...], str]]:
    advised = _ADVISED[what.risk]
    found = [(advised, f"advised for {what.risk} risk{_corrected(advised)}")]
    found += [((name,), f"ours, {settings}: {MEASURED[name, settings].text}") for name, settings in _OURS[what.risk]]
    if not what.safety:
        found += [((name,), f"asks for no safety rows; ours, {settings}: {MEASURED[name, settings].text}") for name, settings in _WITHOUT_ROWS]
    return found


def _corrected(recipe: tuple[str, ...]) -> str:
    """What our table says of an advised recipe's parts that kept no limit there."""
    weak = [name for name in recipe if (name, "default") in MEASURED and MEASURED[name, "default"].feasible.startswith("0 of")]
    return "; ours: " + ", ".join(f"{name} alone feasible on {MEASURED[name, 'default'].feasible} seeds" for name in weak) if weak else ""


def _manner(what: Situation) -> tuple[float, int, str]:
    """(limit on the rise, seeds, what a breach leads to)."""
    if what.risk == "high":
        return 0.05, 3, "rollback"
    if what.risk == "medium":
        return 0.10, 2, "stop"
    return 0.10, 2, "add safegrad" if what.safety else "stop"


def _notes(what: Situation) -> tuple[str, ...]:
    notes = []
    if not what.safety:
        notes.append(
            "Without safety rows no method of ours kept the limits and learnt the task (docs/methods_table.md). Get some before anything else: "
            "a few hundred harmful prompts with refusals, and borderline ones with helpful answers"
        )
    if what.risk == "experimental" and what.safety:
        notes.append("safegrad joins when the monitor sees safety fall (monitor.on_breach); the recipes begin without it")
    if what.gpus == 0:
        notes.append("No GPU: models of a few million parameters at most")
    notes.append("The figures are of a small made-up world and rank mechanisms, not methods for large models: search several and believe your report")
    return tuple(notes)


def _behind_an_api(what: Situation) -> Advice:
    limit, seeds, _ = _manner(what)
    merge = MEASURED["safemerge", "default"]
    left_out = (
        f"SafeMERGE is advised behind an API, but it merges weights, which an API does not give; ours on open weights: {merge.text}, "
        "and it merged nothing at its paper's threshold. For open weights tuned elsewhere: safebasin apply safemerge",
    )
    missing = () if what.safety else (f"[safe_instruct] needs {_GIVE['safety']}",)
    choices = [Choice(("safe_instruct",), f"advised behind an API; ours: {MEASURED['safe_instruct', 'default'].text}")] if what.safety else []
    notes = (
        "safebasin trains and asks models whose weights it has. Behind an API search on a stand-in with open weights: the share of safety rows mixed "
        "in and the instruction carry over to the provider's fine-tuning, the figures do not; ask the tuned model your suites before you release it",
    )
    return Advice((*choices, Choice(("full",), "the control: plain fine-tuning")), (*left_out, *missing), notes, limit, seeds, "stop")
