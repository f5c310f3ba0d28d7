"""What a chat template does around an answer, found out by rendering marked texts: header, end, and what it leaves undone.

A template that ignores `add_generation_prompt` would have a model asked without the assistant's header and trained with it in the loss. The
header is then put where the answer begins, in asking and in training alike, and the template that goes with the model is corrected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.data import template_child, template_rows
from orchestrator.data.turns import Message
from orchestrator.errors import ModelError

MARK, ASKED, AGAIN = "qxzj", "a", "qxzk"
NOTE = "{#- the header below was added by safebasin: the template ignored add_generation_prompt #}"
_KEPT = "_safebasin_template_style"


@dataclass(frozen=True)
class Style:
    """What one tokenizer's template puts before and after an answer."""

    header: str
    """Text that goes between what the template makes of a prompt and the answer; empty for templates that heed `add_generation_prompt`."""
    lead: str
    """Blanks between header and answer, which belong to the answer: where its beginning is given, they go before it."""
    trailer: str
    """Text after an answer that belongs to the next one: of templates that put the header whether or not it is asked for."""
    end: int | None
    """The special token after an answer; None where the template puts none."""
    stops: frozenset[int]
    """All tokens that end an answer."""


def applied(tokenizer: Any, messages: Sequence[Message], *, generation: bool) -> str:
    """The chat template's text as the template makes it. Raises ModelError on a template error, and where it computes without end."""
    template_rows.tried(tokenizer, [(messages, generation)])
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)
    except Exception as error:  # a template is a program: it divides by zero, calls itself without end, adds a list to a text
        roles = ", ".join(message["role"] for message in messages)
        said = template_child.in_words(error)
        raise ModelError(
            f"the chat template refused a conversation with the roles [{roles}]: {said}; see model.chat_template, model.system_prompt"
        ) from error


def style(tokenizer: Any) -> Style:
    """The style of the tokenizer's template, kept with the tokenizer for as long as the template stays the same.

    Raises ModelError for a template that refuses a plain question and answer, or leaves the answer out.
    """
    key = (repr(tokenizer.chat_template), tokenizer.bos_token_id, tokenizer.eos_token_id)
    kept = vars(tokenizer).get(_KEPT)
    if kept is None or kept[0] != key:
        kept = (key, _found(tokenizer))
        vars(tokenizer)[_KEPT] = kept
    return kept[1]


def _found(tokenizer: Any) -> Style:
    before = _before(tokenizer)
    answer = {"role": "assistant", "content": MARK}
    asked, without = (applied(tokenizer, before, generation=generation) for generation in (True, False))
    whole = applied(tokenizer, [*before, answer], generation=False)
    if MARK not in whole:
        raise ModelError("the chat template leaves the assistant's text out, so there is nothing to learn; correct model.chat_template")
    header = lead = trailer = ""
    after = whole.rpartition(MARK)[2]
    if whole.startswith(asked):
        between = whole[len(asked) :].partition(MARK)[0]
        if between.strip():
            header = between.rstrip(" \t") if asked == without else ""
            lead = between[len(header) :] if header else ""
        else:
            lead = between
            trailer = _trailer(tokenizer, before, answer, asked, after) if asked == without else ""
    end = _end(tokenizer, after.removesuffix(trailer) if trailer else after)
    return Style(header, lead, trailer, end, frozenset({end, tokenizer.eos_token_id} - {None}))


def _before(tokenizer: Any) -> list[Message]:
    """A question that the template takes: alone, else after a system message."""
    question = [{"role": "user", "content": ASKED}]
    try:
        applied(tokenizer, question, generation=True)
    except ModelError:
        with_system = [{"role": "system", "content": "b"}, *question]
        try:
            applied(tokenizer, with_system, generation=True)
        except ModelError:
            return question  # whose refusal is the one to tell
        return with_system
    return question


def _trailer(tokenizer: Any, before: list[Message], answer: Message, asked: str, after: str) -> str:
    """What follows an answer and is a header already, by comparing with an answer that another question follows."""
    if not after.strip() or not asked.endswith(after.lstrip()[-1]):
        return ""
    try:
        longer = applied(tokenizer, [*before, answer, {"role": "user", "content": AGAIN}], generation=False).rpartition(MARK)[2]
    except ModelError:
        return ""  # a template of single questions
    ours, theirs = _tokens(tokenizer, after), _tokens(tokenizer, longer)
    common = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    kept = _prefix(tokenizer, after, ours[:common])
    special = special_ids(tokenizer)
    ends = any(token in special for token in ours[:common])  # else what both begin with is the beginning of two headers
    trailer = after[len(kept) :] if ends else after
    return trailer if trailer.strip() and asked.endswith(trailer) else ""


def _prefix(tokenizer: Any, text: str, ids: list[int]) -> str:
    """The beginning of `text` that these of its tokens stand for: the longest one whose tokens they are."""
    return next((text[:size] for size in range(len(text), 0, -1) if _tokens(tokenizer, text[:size]) == ids), "")


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0]


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokenizer's special tokens."""
    return set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _end(tokenizer: Any, after: str) -> int | None:
    special = special_ids(tokenizer)
    special -= {tokenizer.unk_token_id, tokenizer.bos_token_id} - {tokenizer.eos_token_id}  # an unknown word ends nothing
    return next((token for token in _tokens(tokenizer, after) if token in special), None)


# ------------------------------------------------------------------------------------------------ the template that goes with the model


def correct(tokenizer: Any) -> None:
    """Give the tokenizer a template that heeds `add_generation_prompt`, where its own does not; nothing is done to any other.

    So the model that is handed over is asked by everybody as it was trained. Raises ModelError where the header cannot be added.
    """
    found = style(tokenizer)
    if not found.header:
        return
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else None
    own = named["default"] if named is not None else tokenizer.chat_template
    literal = found.header.encode("unicode-escape").decode().replace("'", "\\'")
    text = f"{own.removesuffix(chr(10))}{NOTE}{{%- if add_generation_prompt %}}{{{{- '{literal}' }}}}{{%- endif %}}"
    probes = [_before(tokenizer), [*_before(tokenizer), {"role": "assistant", "content": MARK}]]
    wanted = [applied(tokenizer, probe, generation=False) + (found.header if generation else "") for probe in probes for generation in (False, True)]
    before = tokenizer.chat_template
    tokenizer.chat_template = text if named is None else {**named, "default": text}
    if [applied(tokenizer, probe, generation=generation) for probe in probes for generation in (False, True)] != wanted:
        tokenizer.chat_template = before
        raise ModelError(
            f"the chat template ignores add_generation_prompt and puts {found.header!r} before answers; it could not be corrected, so add "
            f"{{% if add_generation_prompt %}}{{{{ '{literal}' }}}}{{% endif %}} at its end (model.chat_template)"
        )


def notes(tokenizer: Any) -> list[str]:
    """What is to be said of the template: that its header was added; that it puts text of its own before answers, which is learnt with them."""
    template = tokenizer.chat_template
    if NOTE in (template.get("default", "") if isinstance(template, dict) else template):
        return ["the chat template ignores add_generation_prompt; the assistant's header was added to it, for asking, training and the saved model"]
    return []
