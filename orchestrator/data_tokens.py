"""Conversations become tokenised examples with labels on the answer only.

One template for everything: what is trained is the continuation of exactly the tokens that `evaluation.generate` starts from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.errors import DataError, ModelError

if TYPE_CHECKING:
    from orchestrator.data import Conversation
    from strategies.base import Example

IGNORE = -100
Message = dict[str, str]


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


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """Messages with the system prompt in front, where there is one and the conversation has none of its own."""
    messages = list(messages)
    if not system or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def render(tokenizer: Any, messages: Sequence[Message], *, generation: bool) -> str:
    """The chat template's text; `generation` ends it where the assistant's answer begins. Raises ModelError on a template error."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)
    except (TemplateError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ModelError(
            f"the chat template refused a conversation with the roles [{roles}]: {error}; see model.chat_template, model.system_prompt"
        ) from error


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
    answer = "qxzj"
    full = render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}], generation=False)
    special = set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special -= {tokenizer.unk_token_id, tokenizer.bos_token_id} - {tokenizer.eos_token_id}  # an unknown word ends nothing
    after = full.rpartition(answer)[2] if answer in full else ""
    tail = encode(tokenizer, [after])[0]
    end = next((token for token in tail if token in special), None)
    stops = {end, tokenizer.eos_token_id} - {None}
    return end, frozenset(stops)


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered texts. The template has put the special tokens already, so none are added: no double BOS."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def tokenise(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    *,
    max_length: int,
    system_prompt: str | None = None,
    kind: str | None = None,
    field: str = "task.data",
) -> tuple[tuple[Example, ...], TokeniseReport]:
    """Examples with labels on the last answer and on the token that ends it, everything else -100; kind overrides the rows' own.

    The tokens before the answer are exactly those that generation starts from. Where the tokenizer would merge characters across
    that border, the answer is tokenised on its own. Rows longer than `max_length` lose their end; rows that lose the whole answer
    are dropped. Raises ModelError where the template renders a prompt differently in training and in generation, DataError where no
    row is left.
    """
    from strategies.base import Example

    end, _ = turn_end(tokenizer)
    pairs = [_prompt_and_answer(c, tokenizer, system_prompt) for c in conversations]
    prompts, wholes = encode(tokenizer, [p for p, _ in pairs]), encode(tokenizer, [p + a for p, a in pairs])
    examples, cut, dropped = [], 0, 0
    for conversation, (_, answer), prompt, whole in zip(conversations, pairs, prompts, wholes, strict=True):
        joined = whole[: len(prompt)] == prompt
        tail = whole[len(prompt) :] if joined else encode(tokenizer, [answer])[0]
        tail = _ended(tail, end, tokenizer.eos_token_id)
        ids = (prompt + tail)[:max_length]
        cut += len(prompt) + len(tail) > max_length
        if len(ids) <= len(prompt):
            dropped += 1
            continue
        labels = [IGNORE] * len(prompt) + ids[len(prompt) :]
        examples.append(Example(tuple(ids), tuple(labels), conversation.id, kind or conversation.kind))
    if conversations and not examples:
        section = field.split(".")[0]
        shortest = min(map(len, prompts))
        raise DataError(
            f"{field}: all {len(conversations)} rows lose their whole answer at task.max_length={max_length} "
            f"(the shortest {section} prompt has {shortest} tokens); raise task.max_length above {shortest + 1}"
        )
    answer_tokens = sum(label != IGNORE for e in examples for label in e.labels)
    report = TokeniseReport(len(conversations), cut, dropped, sum(len(e.input_ids) for e in examples), answer_tokens)
    return tuple(examples), report


def _prompt_and_answer(conversation: Conversation, tokenizer: Any, system_prompt: str | None) -> tuple[str, str]:
    messages = with_system(conversation.messages, system_prompt)
    prompt = render(tokenizer, messages[:-1], generation=True)
    whole = render(tokenizer, messages, generation=False)
    if not whole.startswith(prompt):
        raise ModelError(
            f"the chat template writes the prompt of row {conversation.id!r} differently for training and for generation "
            f"(...{prompt[-60:]!r} is no "
            "beginning of the whole conversation), so what is trained would not be what is asked; correct model.chat_template"
        )
    return prompt, whole[len(prompt) :]


def _ended(tail: list[int], end: int | None, eos: int | None) -> list[int]:
    """The answer's tokens up to the template's end-of-turn token; without one, the tokenizer's end-of-sequence is appended."""
    if end is not None and end in tail:
        return tail[: tail.index(end) + 1]
    return tail if eos is None or (tail and tail[-1] == eos) else [*tail, eos]
