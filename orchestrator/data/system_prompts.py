"""Under which system prompts a model is trained and evaluated, and whether the two differ without anybody having asked for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from orchestrator.config import Experiment, recipe_items
from orchestrator.data.conversations import Conversation
from orchestrator.records import TrialResult

SHOWN = 80
"""Characters of a system prompt in a sentence."""


def own_prompts(rows: Iterable[Conversation]) -> Counter[str]:
    """System messages that rows bring themselves, and in how many rows each stands. They win over any prompt of the experiment."""
    return Counter(row.messages[0]["content"] for row in rows if row.messages[0]["role"] == "system")


def facts(rows: Sequence[Conversation], own: str | None, training: str | None, evaluation: str | None) -> dict[str, Any]:
    """What a trial's record says: both prompts, how many training rows come with another one, and whether training and evaluation differ.

    own: the experiment's; training, evaluation: what the recipe made of it. `asked_for`: the recipe set the two apart, and nothing else does.
    """
    others = sum(count for text, count in own_prompts(rows).items() if (text or None) != evaluation)
    apart = (training or None) != (evaluation or None)
    return {
        "train_system_prompt": training, "evaluation_system_prompt": evaluation, "experiment_system_prompt": own,
        "rows_with_other_system_prompt": others, "mismatch": apart or others > 0, "asked_for": apart and not others,
    }  # fmt: skip


def warnings(experiment: Experiment, rows: Sequence[Conversation], implicit: str | None = None) -> list[str]:
    """What `validate` and `run` say before anything is trained; [] where training rows bring no system prompt of their own, or the same,
    and the chat template puts none where none is given (`implicit`)."""
    return _implicit(experiment, implicit) + _others(experiment, rows)


def _implicit(experiment: Experiment, implicit: str | None) -> list[str]:
    sets_prompts = any(name == "prompt_template" for recipe in experiment.recipes for name, _ in recipe_items(recipe))
    if implicit is None or (experiment.model.system_prompt and not sets_prompts):
        return []
    return [
        f"the chat template puts {quoted(implicit)} wherever none is given, so that `no system prompt` means that one here, in training, "
        "evaluation and attacks; give model.system_prompt or model.chat_template to have another"
    ]


def _others(experiment: Experiment, rows: Sequence[Conversation]) -> list[str]:
    own = experiment.model.system_prompt
    found = own_prompts(rows)
    others = sum(count for text, count in found.items() if (text or None) != own)
    if not others:
        return []
    common = found.most_common(1)[0][0]
    return [
        f"TEMPLATE MISMATCH: {others} of {len(rows)} training rows bring a system prompt of their own ({quoted(common)}), the safety suites are "
        f"asked under {quoted(own)}; safety measured there says little about use with theirs. Set model.system_prompt to theirs, take it "
        "out of the rows, or set both sides with the strategy prompt_template"
    ]


def alerts(results: Iterable[TrialResult]) -> list[str]:
    """What a report says above everything else: trials whose evaluation saw another system prompt than their training, unasked."""
    found = [r for r in results if (r.facts.get("template") or {}).get("mismatch") and not r.facts["template"]["asked_for"]]
    if not found:
        return []
    first = found[0].facts["template"]
    return [
        f"TEMPLATE MISMATCH in {len(found)} trial{'s' if len(found) > 1 else ''}: {first['rows_with_other_system_prompt']} training rows came "
        f"with a system prompt of their own, the safety suites were asked under {quoted(first['evaluation_system_prompt'])}. The safety figures do "
        "not hold for use under the rows' prompt. Set model.system_prompt to theirs, take it out of the rows, or use prompt_template."
    ]


def serving(result: TrialResult) -> list[str]:
    """How to use a model whose recipe set training and evaluation apart; [] where it did not."""
    known = result.facts.get("template") or {}
    if not known.get("asked_for"):
        return []
    return [
        f"{result.trial_id} was trained under {quoted(known['train_system_prompt'])} and measured under "
        f"{quoted(known['evaluation_system_prompt'], None)}, as its recipe says: the figures hold for use with the latter."
    ]


def quoted(text: str | None, limit: int | None = SHOWN) -> str:
    """A system prompt in a sentence, its beginning where it is long."""
    if not text:
        return "no system prompt"
    text = " ".join(text.split())
    return f"the system prompt {text if limit is None or len(text) <= limit else text[:limit] + '...'!r}"
