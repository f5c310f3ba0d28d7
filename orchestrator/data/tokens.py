"""Conversations become tokenised examples with labels on the answer only.

One template for everything: what is trained is the continuation of exactly the tokens that `evaluation.generate` starts from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.data import special_tokens, template, template_limits, template_rows, thoughts
from orchestrator.data.turns import Message
from orchestrator.errors import DataError, ModelError

if TYPE_CHECKING:
    from orchestrator.data.conversations import Conversation
    from strategies.base import Example

IGNORE = -100


@dataclass(frozen=True)
class TokeniseReport:
    """What became of the rows: `cut` lost their end to `max_length`, `dropped` lost the whole answer and are not trained on."""

    rows: int
    cut: int
    dropped: int
    tokens: int
    """All tokens of the rows that are left."""
    answer_tokens: int
    """Those of them with a label."""
    thought_tokens: int = 0
    """Tokens of thoughts that are read and not learnt (`task.train_on_thoughts`)."""


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """Messages with the system prompt in front, where there is one and the conversation has none of its own."""
    messages = list(messages)
    if not system or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def render(tokenizer: Any, messages: Sequence[Message], *, generation: bool) -> str:
    """The chat template's text; `generation` ends it where the assistant's answer begins, also where the template does not heed it
    (`template`). Raises ModelError on a template error."""
    text = template.applied(tokenizer, messages, generation=generation)
    return text + template.style(tokenizer).header if generation else text


def implicit_system_prompt(tokenizer: Any) -> str | None:
    """The system prompt that the chat template puts where a conversation has none (Qwen2's does); None where it puts none, or takes none."""
    mark, user = "qxzjsystem", {"role": "user", "content": "a"}
    try:
        given = render(tokenizer, [{"role": "system", "content": mark}, user], generation=True)
    except ModelError:
        return None
    before, found, after = given.partition(mark)
    without = render(tokenizer, [user], generation=True)
    if not found or not (without.startswith(before) and without.endswith(after)):
        return None
    return without[len(before) : len(without) - len(after)].strip() or None


def turn_end(tokenizer: Any) -> tuple[int | None, frozenset[int]]:
    """(the special token the template puts after an answer, None where it puts none; all tokens that end an answer)."""
    found = template.style(tokenizer)
    return found.end, found.stops


def encode(tokenizer: Any, texts: Sequence[str], at_most: int | None = None) -> list[list[int]]:
    """Token ids of rendered texts. The template has put the special tokens already, so none are added: no double BOS.

    at_most: of texts too long to need all their tokens, the first `at_most` and one more.
    """
    if not texts:
        return []
    room = None if at_most is None else max(LONG_TEXT, LONG_TOKEN * at_most)
    long = {i: text for i, text in enumerate(texts) if room is not None and len(text) > room}
    found = _ids(tokenizer, ["" if i in long else text for i, text in enumerate(texts)])
    for i, text in long.items():
        found[i] = _beginning(tokenizer, text, room or 0, at_most or 0)
    return found


LONG_TEXT, LONG_TOKEN = 200_000, 40
"""Characters from which only the beginning of a text is tokenised, and characters that tokens are shorter than on average."""


def _beginning(tokenizer: Any, text: str, size: int, count: int) -> list[int]:
    """The first `count` tokens of a long text and one more: of a beginning of it, once one twice as long gives the same."""
    ids = _ids(tokenizer, [text[:size]])[0]
    while size < len(text):
        size *= 2
        longer = _ids(tokenizer, [text[:size]])[0]
        if len(ids) > count and longer[: count + 1] == ids[: count + 1]:
            break
        ids = longer
    return ids[: count + 1]


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def tokenise(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    *,
    max_length: int,
    system_prompt: str | None = None,
    kind: str | None = None,
    field: str = "task.data",
    train_on_thoughts: bool = True,
) -> tuple[tuple[Example, ...], TokeniseReport]:
    """Examples with labels on the last answer and on the token that ends it, everything else -100; kind overrides the rows' own.

    The tokens before the answer are exactly those that generation starts from. Where the tokenizer would merge characters across
    that border, the answer is tokenised on its own. Rows longer than `max_length` lose their end; rows that lose the whole answer
    are dropped. Without `train_on_thoughts` the thoughts in an answer are read and have no label; rows that are nothing but thoughts are
    dropped. An end token at an answer's end is taken off first (`special_tokens`). Raises ModelError, naming the row, where the template
    refuses a conversation, leaves a message out, or renders a prompt differently in training and in generation; DataError for an end token
    inside an answer, and where no row is left.
    """
    from strategies.base import Example

    conversations, halves = split_tokens(conversations, tokenizer, at_most=max_length, system_prompt=system_prompt, field=field)
    prompts = [prompt for prompt, _ in halves]
    masks = [0] * len(halves) if train_on_thoughts else _thoughts(conversations, halves, tokenizer, system_prompt, field)
    begun = [_begun(conversation, tail, tokenizer) for conversation, (_, tail) in zip(conversations, halves, strict=True)]
    examples, cut, dropped, unlearnt = [], 0, 0, 0
    for conversation, (prompt, tail), mask, given in zip(conversations, halves, masks, begun, strict=True):
        ids = (prompt + tail)[:max_length]
        cut += len(prompt) + len(tail) > max_length
        read = len(prompt) + max(mask, given)
        if len(ids) <= read:
            dropped += 1
            continue
        unlearnt += mask
        labels = [IGNORE] * read + ids[read:]
        examples.append(Example(tuple(ids), tuple(labels), conversation.id, kind or conversation.kind))
    if conversations and not examples:
        section = field.split(".")[0]
        shortest = min(map(len, prompts))
        raise DataError(
            f"{field}: all {len(conversations)} rows lose their whole answer at task.max_length={max_length} "
            f"(the shortest {section} prompt has {shortest} tokens); raise task.max_length above {shortest + 1}"
        )
    answer_tokens = sum(label != IGNORE for e in examples for label in e.labels)
    report = TokeniseReport(len(conversations), cut, dropped, sum(len(e.input_ids) for e in examples), answer_tokens, unlearnt)
    return tuple(examples), report


def _begun(conversation: Conversation, tail: list[int], tokenizer: Any) -> int:
    """How many tokens of an answer it was begun with: those that the beginning alone shares with it."""
    alone = encode(tokenizer, [conversation.begun])[0] if conversation.begun else []
    return next((i for i, (a, b) in enumerate(zip(alone, tail, strict=False)) if a != b), min(len(alone), len(tail)))


def _thoughts(
    conversations: Sequence[Conversation], halves: Sequence[tuple[list[int], list[int]]], tokenizer: Any, system_prompt: str | None, field: str
) -> list[int]:
    """How many tokens of each answer are thoughts: those it shares with the answer up to where its last block of thoughts ends."""
    found = []
    for conversation, (_, tail) in zip(conversations, halves, strict=True):
        prompt, answer = _prompt_and_answer(conversation, tokenizer, system_prompt, field)
        begun = thoughts.opened(prompt)
        if not thoughts.split(conversation.answer, begun).said:
            found.append(len(tail))
            continue
        size = thoughts.length(answer, begun)
        alone = encode(tokenizer, [answer[:size]])[0] if size else []
        same = next((i for i, (a, b) in enumerate(zip(alone, tail, strict=False)) if a != b), min(len(alone), len(tail)))
        found.append(same)
    return found


def split_tokens(
    conversations: Sequence[Conversation], tokenizer: Any, *, at_most: int, system_prompt: str | None = None, field: str = "task.data"
) -> tuple[list[Conversation], list[tuple[list[int], list[int]]]]:
    """(conversations without end tokens at their end, (tokens of the prompt, tokens of the answer with its end) of each).

    at_most: of texts too long to need all their tokens, the first `at_most` and one more. Raises as `tokenise` does, but not where rows are long.
    """
    end, _ = turn_end(tokenizer)
    conversations, _, _ = special_tokens.cleaned(conversations, tokenizer, field)
    check_roles(conversations, tokenizer, system_prompt, field)
    _try(conversations, tokenizer, system_prompt, field)
    pairs = [_prompt_and_answer(c, tokenizer, system_prompt, field) for c in conversations]
    prompts = encode(tokenizer, [p for p, _ in pairs], at_most)
    wholes = encode(tokenizer, [p + a for p, a in pairs], at_most)
    halves = []
    for (_, answer), prompt, whole in zip(pairs, prompts, wholes, strict=True):
        joined = whole[: len(prompt)] == prompt
        tail = whole[len(prompt) :] if joined else encode(tokenizer, [answer], at_most)[0]
        halves.append((prompt, _ended(tail, end, tokenizer.eos_token_id)))
    return conversations, halves


def _try(conversations: Sequence[Conversation], tokenizer: Any, system_prompt: str | None, field: str) -> None:
    """Every row can be rendered in little time (`template_rows`). Raises ModelError naming the one that cannot."""
    whole = [with_system(conversation.messages, system_prompt) for conversation in conversations]
    cases = [case for messages in whole for case in ((messages[:-1], True), (messages, False))]
    template_rows.tried(tokenizer, cases, lambda i: f"{field}: {special_tokens.place(conversations[i // 2])}")


def check_roles(conversations: Sequence[Conversation], tokenizer: Any, system_prompt: str | None, field: str) -> None:
    """Every order of roles among the conversations is taken by the template, and no message's text left out. Raises ModelError, naming a row."""
    first: dict[tuple[str, ...], Conversation] = {}
    for conversation in conversations:
        first.setdefault(tuple(message["role"] for message in with_system(conversation.messages, system_prompt)), conversation)
    for roles, conversation in first.items():
        place = f"{field}: {special_tokens.place(conversation)}"
        lost = left_out(tokenizer, roles, place, generation=False)
        if lost is not None:
            raise ModelError(
                f"{place}: the chat template leaves out a message of the {lost} (roles: {', '.join(roles)}), so "
                "the row would be asked and learnt without it; correct model.chat_template, take such messages out of the rows"
                + (", or leave model.system_prompt out" if lost == "system" and system_prompt else "")
            )


def left_out(tokenizer: Any, roles: Sequence[str], place: str, *, generation: bool) -> str | None:
    """The role of the first message that the template leaves out of a conversation of these roles; None where it takes all of them.

    Raises ModelError, beginning with `place`, where it refuses them.
    """
    marked = [{"role": role, "content": f"qxzj{i}z"} for i, role in enumerate(roles)]
    try:
        text = render(tokenizer, marked, generation=generation)
    except ModelError as error:
        raise ModelError(f"{place}: {error}") from error
    return next((message["role"] for message in marked if message["content"] not in text), None)


def _prompt_and_answer(conversation: Conversation, tokenizer: Any, system_prompt: str | None, field: str) -> tuple[str, str]:
    """(the prompt's text up to where the answer begins, the rest of the whole conversation's)."""
    messages = with_system(conversation.messages, system_prompt)
    try:
        prompt = render(tokenizer, messages[:-1], generation=True)
        whole = render(tokenizer, messages, generation=False)
    except ModelError as error:
        raise ModelError(f"{field}: {special_tokens.place(conversation)}: {error}") from error
    if not whole.startswith(prompt):
        raise ModelError(
            f"{field}: the chat template writes the prompt of {special_tokens.place(conversation)} differently for training and for generation "
            f"(...{prompt[-60:]!r} is no "
            "beginning of the whole conversation), so what is trained would not be what is asked; correct model.chat_template"
        )
    lost = template_limits.lost(messages, whole)
    if lost is not None and lost["role"] != "system":
        raise ModelError(
            f"{field}: {special_tokens.place(conversation)}: the chat template cuts or changes the text of a message of the {lost['role']}, so that "
            "something else would be asked and learnt than the row says; correct model.chat_template"
        )
    trailer = template.style(tokenizer).trailer
    return prompt, whole[len(prompt) :].removesuffix(trailer)


def _ended(tail: list[int], end: int | None, eos: int | None) -> list[int]:
    """The answer's tokens up to the template's end-of-turn token; without one, the tokenizer's end-of-sequence is appended."""
    if end is not None and end in tail:
        return tail[: tail.index(end) + 1]
    return tail if eos is None or (tail and tail[-1] == eos) else [*tail, eos]
