"""Checks that tokenise: rows that `task.max_length` cuts or drops, and texts longer than the model's context or refused by its template.

What tokenizer and config.json tell is told before a device is taken. Huge data is sampled: its first rows and a seeded draw of the others.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from orchestrator.config import Experiment, recipe_items
from orchestrator.data import tokens
from orchestrator.data.conversations import Conversation
from orchestrator.data.counted import KEPT, Fit
from orchestrator.errors import DataError, ModelError
from orchestrator.evaluation import generate
from orchestrator.evaluation.metrics import NEG_LOSS
from orchestrator.evaluation.suites import PromptSuite
from orchestrator.trial.materials import Materials

LOOKED_AT = 5000
"""Rows of one source that are tokenised here."""
FIRST = 1000
"""The first of them, which a user looks at too; the others are drawn."""
WARN, REFUSE = 0.05, 0.5
"""Share of rows dropped or cut from which one is warned; share of rows dropped from which nothing is started."""
LONGEST = 1 << 17
"""Tokens that lengths are counted up to."""

Item = TypeVar("Item")


@dataclass
class Tokens:
    """What tokenising found."""

    fits: list[Fit] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Source:
    """Rows that are trained on, or scored by their likelihood: what `tokenise` will be given."""

    field: str
    what: str
    rows: Sequence[Conversation]
    used: bool
    """Whether any recipe, or the score, needs them."""
    systems: tuple[str | None, ...]


def check(experiment: Experiment, found: Materials, tokenizer: Any, settings: Any, users: Sequence[str]) -> Tokens:
    """Tokenise rows, evaluation rows and suites as the run will. `settings`: the model's config; `users`: recipes that use safety rows.

    Raises DataError or ModelError, naming source and row (from 1), for what would end the run: most rows dropped, a text longer than the
    context, roles that the template refuses.
    """
    told = Tokens()
    context = Context.of(settings, tokenizer)
    trained, asked = system_prompts(experiment)
    for source in _sources(experiment, found, users, trained, asked):
        _check_source(experiment, source, tokenizer, context, told)
    if experiment.task.metric != NEG_LOSS and found.scored:
        _check_evaluation(experiment, found.scored, tokenizer, context, asked, told)
    for suite in found.suites:
        _check_suite(experiment, suite, tokenizer, context, asked, told)
    return told


# ------------------------------------------------------------------------------------------------ what is asked of whom


@dataclass(frozen=True)
class Context:
    """Positions a model has."""

    size: int | None
    """None where nothing says it."""
    learned: bool
    """Whether positions are rows of a table, so that one beyond its end is an index error."""
    said_by: str

    @classmethod
    def of(cls, settings: Any, tokenizer: Any) -> Context:
        """From config.json, else from the tokenizer's `model_max_length`."""
        body = settings.get_text_config()
        name = next((n for n in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx") if _number(body, n)), None)
        if name is not None:
            return cls(_number(body, name), not _relative(body), f"config.json: {name}")
        size = getattr(tokenizer, "model_max_length", None)
        return cls(size if isinstance(size, int) and size < 10**7 else None, False, "the tokenizer: model_max_length")


def _number(body: Any, name: str) -> int | None:
    value = getattr(body, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _relative(body: Any) -> bool:
    """Whether positions are computed (rotary, ALiBi, relative), so that any length runs."""
    found = body.to_dict()
    for nested in [value for value in found.values() if isinstance(value, dict)]:  # MPT's attn_config
        found = found | nested
    names = [str(name).lower() for name, value in found.items() if value not in (None, False)]
    return any(part in name for name in names for part in ("rope", "rotary", "alibi", "relative_attention"))


def system_prompts(experiment: Experiment) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """(system prompts that rows are trained under, those that suites and rows are asked under), over the untouched model and all recipes."""
    import strategies.recipe
    from strategies.prompt_template import PromptTemplate, prompts

    own = experiment.model.system_prompt or None
    trained, asked = {own: None}, {own: None}
    for recipe in experiment.recipes:
        built = strategies.recipe.build(recipe_items(recipe), experiment.monitor.added)
        asked[built.system_prompt(own) or None] = None
        for one in built.strategies:
            if isinstance(one, PromptTemplate):
                knobs = one.config
                pinned = "form" in dict(recipe_items(recipe)).get("prompt_template", {})
                for form in (knobs.form,) if pinned else ("ptst", "same"):  # the search tries both
                    trained[prompts(own, form, knobs.train_system_prompt, knobs.eval_system_prompt)[0]] = None
    return tuple(trained), tuple(asked)


def _sources(experiment: Experiment, found: Materials, users: Sequence[str], trained, asked) -> Iterator[_Source]:
    harmful = "safety.harmful_data" if experiment.safety.harmful_data else "safety.data"
    yield _Source("task.data", "training rows", found.train, True, trained)
    yield _Source("safety.data", "safety rows", found.safety, bool(users), trained)
    yield _Source(harmful, "harmful rows", found.harmful, bool(users), trained)
    if experiment.task.metric == NEG_LOSS:
        yield _Source(_evaluation_field(experiment), "evaluation rows", found.scored, True, asked)


def _evaluation_field(experiment: Experiment) -> str:
    return "task.eval_data" if experiment.task.eval_data is not None else "task.data"


def _place(experiment: Experiment, key: str) -> str:
    """`task.data (rows.jsonl)`: the key and the source behind it."""
    section, _, name = key.partition(".")
    return f"{key} ({getattr(getattr(experiment, section), name)})"


def sampled(items: Sequence[Item]) -> list[tuple[int, Item]]:
    """(position from 0, item) of those that are looked at: all, or the first ones and a seeded draw of the others, in order."""
    if len(items) <= LOOKED_AT:
        return list(enumerate(items))
    drawn = random.Random(0).sample(range(FIRST, len(items)), LOOKED_AT - FIRST)
    return [(i, items[i]) for i in (*range(FIRST), *sorted(drawn))]


# ------------------------------------------------------------------------------------------------ rows


def _check_source(experiment: Experiment, source: _Source, tokenizer: Any, context: Context, told: Tokens) -> None:
    looked = [row for _, row in sampled(source.rows)]
    if not looked:
        return
    place = _place(experiment, source.field)
    longest = max(source.systems, key=lambda text: len(text or ""))
    for system in source.systems:
        if system != longest:
            tokens.check_roles(looked, tokenizer, system, place)
    rows, halves = tokens.split_tokens(looked, tokenizer, at_most=LONGEST, system_prompt=longest, field=place)
    lengths = [(len(prompt), len(prompt) + len(tail)) for prompt, tail in halves]
    fit = _fit(experiment, source, lengths)
    told.fits.append(fit)
    lost = fit.dropped / fit.looked
    if lost > REFUSE and source.used:
        raise DataError(f"{place}: {fit.sentence}; more than half are lost. {fit.advice}{_beyond(fit.needed, context)}")
    if (fit.cut + fit.dropped) / fit.looked > WARN:
        told.warnings.append(f"{place}: {fit.sentence}; {fit.advice}{_beyond(fit.needed, context)}")
    _check_positions(rows, lengths, fit.max_length, place, context, told)


def _fit(experiment: Experiment, source: _Source, lengths: Sequence[tuple[int, int]]) -> Fit:
    limit = experiment.task.max_length
    dropped = sum(prompt >= limit for prompt, _ in lengths)
    cut = sum(prompt < limit < whole for prompt, whole in lengths)
    needed = sorted(whole for _, whole in lengths)[math.ceil(KEPT * len(lengths)) - 1]
    return Fit(source.field, source.what, len(source.rows), len(lengths), cut, dropped, limit, needed)


def _beyond(needed: int, context: Context) -> str:
    if context.size is None or needed <= context.size:
        return ""
    return f" (but the model has {context.size} positions: shorten the rows, or leave the long ones out)"


def _check_positions(rows, lengths, max_length: int, place: str, context: Context, told: Tokens) -> None:
    """Rows that are trained on beyond the model's last position."""
    if context.size is None:
        return
    beyond = [(row, min(whole, max_length)) for row, (prompt, whole) in zip(rows, lengths, strict=True) if prompt < max_length]
    beyond = [(row, length) for row, length in beyond if length > context.size]
    if not beyond:
        return
    row, length = beyond[0]
    text = (
        f"{place}: row {row.row or row.id} has {length} tokens, the model {context.size} positions ({context.said_by}), as {len(beyond)} of "
        f"{len(lengths)} rows looked at; set task.max_length={context.size}, or shorten the rows"
    )
    if context.learned:
        raise DataError(text)
    told.warnings.append(f"{text}. The model computes its positions and will run, beyond what it was made for")


# ------------------------------------------------------------------------------------------------ what is asked


def _check_evaluation(experiment: Experiment, rows: Sequence[Conversation], tokenizer: Any, context: Context, asked, told: Tokens) -> None:
    place, looked = _place(experiment, _evaluation_field(experiment)), sampled(rows)
    names = [f"row {row.row or row.id}" for _, row in looked]
    for system in asked:
        tokens.check_roles([row for _, row in looked], tokenizer, system, place)
    longest = max(asked, key=lambda text: len(text or ""))
    ids = generate.encode_prompts(tokenizer, [row.prompt for _, row in looked], longest)
    _check_room(place, names, [len(one) for one in ids], "task.max_new_tokens", experiment.task.max_new_tokens, context, told)


def _short_answers(suite: PromptSuite, place: str, looked: Sequence[int], tokenizer: Any) -> list[str]:
    """A warning where harmful answers are too short for the depth that an attack begins them to."""
    deep = [suite.framed[i] for i in looked if suite.framed is not None and suite.framed[i].depth is not None]
    texts = [framed.prefill for framed in deep]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]] if texts else []
    short = sum(length // 2 < (framed.depth or 0) for framed, length in zip(deep, lengths, strict=True))
    if not short:
        return []
    return [
        f"{place}: {short} of {len(deep)} harmful answers have fewer than {2 * (deep[0].depth or 0)} tokens (the shortest {min(lengths)}), so they "
        f"are begun with half of their tokens, not with {deep[0].depth}: the harm must be in what the model writes"
    ]


def _check_suite(experiment: Experiment, suite: PromptSuite, tokenizer: Any, context: Context, asked, told: Tokens) -> None:
    """Every prompt as it will be asked: framed by its attack, under its own system prompt or those of the recipes."""
    place = f"safety.suites {suite.name} ({suite.source.get('data', suite.name)})"
    looked = [i for i, _ in sampled(suite.prompts)]
    names = [f"prompt {i + 1} (id {suite.ids[i]})" for i in looked]
    told.warnings += _short_answers(suite, place, looked, tokenizer)
    _check_openings(suite, place, tokenizer)
    prompts = [suite.asked(i, tokenizer) for i in looked]
    lengths = [0] * len(looked)
    for system in asked:
        systems = [(suite.systems[i] if suite.systems else None) or system for i in looked]
        _check_asked_roles(place, names, prompts, systems, tokenizer)
        found = generate.encode_prompts(tokenizer, prompts, systems, where=place)
        lengths = [max(a, len(b)) for a, b in zip(lengths, found, strict=True)]
    _check_room(place, names, lengths, "safety.max_new_tokens", experiment.safety.max_new_tokens, context, told)


def _check_openings(suite: PromptSuite, place: str, tokenizer: Any) -> None:
    """What answers are begun with can be written: an unknown word would make the attack another one, and its figure mean nothing. Raises
    ModelError."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    for text in sorted({framed.prefill for framed in suite.framed or () if framed.prefill and framed.depth is None}):
        if unknown is not None and unknown in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]:
            raise ModelError(
                f"{place}: the model's tokenizer cannot write the opening {text!r} (it holds {tokenizer.unk_token} for a word of it), so the attack "
                f"{suite.attack} would ask something else; set safety.suites {suite.name}.opening to words that the model knows"
            )


def _check_asked_roles(place: str, names: Sequence[str], prompts: Sequence[Any], systems: Sequence[str | None], tokenizer: Any) -> None:
    """The template takes every order of roles that is asked, and leaves no system prompt out. Raises ModelError naming the prompt."""
    seen: set[tuple[str, ...]] = set()
    for name, prompt, system in zip(names, prompts, systems, strict=True):
        if isinstance(prompt, generate.Plain):
            continue
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        roles = tuple(message["role"] for message in tokens.with_system(messages, system))
        roles = roles[:-1] if roles[-1] == "assistant" else roles
        if roles in seen:
            continue
        seen.add(roles)
        lost = tokens.left_out(tokenizer, roles, f"{place}: {name}", generation=True)
        if lost is not None:
            raise ModelError(
                f"{place}: {name}: the chat template leaves out the {lost} message (roles: {', '.join(roles)}), so it would be asked without it; "
                "correct model.chat_template, or take the system prompt out of the suite, model.system_prompt and the recipes"
            )


def _check_room(place: str, names: Sequence[str], lengths: Sequence[int], key: str, new: int, context: Context, told: Tokens) -> None:
    """Prompts leave room for an answer. Raises DataError where one leaves none."""
    if context.size is None:
        return
    full = [(name, length) for name, length in zip(names, lengths, strict=True) if length >= context.size]
    if full:
        raise DataError(
            f"{place}: {full[0][0]} has {full[0][1]} tokens, template and system prompt included, the model {context.size} positions "
            f"({context.said_by}), as {len(full)} of {len(lengths)} looked at; shorten them, or leave them out"
        )
    short = [(name, length) for name, length in zip(names, lengths, strict=True) if length + new > context.size]
    if short:
        told.warnings.append(
            f"{place}: {short[0][0]} has {short[0][1]} tokens, so that its answer ends after {context.size - short[0][1]} of {key}={new} (the model "
            f"has {context.size} positions), as {len(short)} of {len(lengths)} looked at"
        )

