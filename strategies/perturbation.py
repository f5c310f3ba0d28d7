"""Ask randomly perturbed copies of a prompt and let the majority decide whether it is answered.

Stage: inference, around generation; training is plain, or none at all (train=false).
Paper: Robey et al., "SmoothLLM: Defending Large Language Models Against Jailbreaking Attacks", arXiv 2310.03684; Cao et al., "Defending
    Against Alignment-Breaking Attacks via Robustly Aligned LLM" (RA-LLM), ACL 2024, arXiv 2309.14348.
Reference: arobey1/smooth-llm (1855c87), read, its perturbations run; AAAAAAsuka/llm_defends (d23ac2c), read.
Idea: adversarial suffixes are brittle, so a few changed characters break them. smoothllm: answer `copies` perturbed prompts, take the
    majority over refused or not, return one of the answers that agree with it. ra_llm: ask the prompt as it is; where that is answered,
    ask copies with words dropped for a few tokens each, and refuse where a share `threshold` of them is refused.
Knobs: form - smoothllm or ra_llm. kind - what is done to characters in smoothllm: swap, patch, insert. copies - perturbed copies per
    prompt (smoothllm 10, ra_llm 20 in the papers). rate - share of characters (smoothllm, 0.1) or words (ra_llm, 0.3) perturbed; the
    paper's without it. threshold - ra_llm: share of refused copies from which on the prompt is refused (0.2). tokens - ra_llm: tokens
    generated per copy (10). seed - of the perturbations. phrases - beginnings of a refusal, looked for anywhere in an answer, separated
    by |. refusal - what ra_llm answers when it refuses. train - false leaves the weights untouched: the defence around the original model.
Cost: smoothllm `copies` times the generation; ra_llm one more pass and up to `copies` short ones, ended as soon as the verdict stands.
Needs: nothing.
Limits: aims at adversarial suffixes. Does little against plain harmful prompts after fine-tuning, since there is no brittle suffix to
    break: read it as a probe, or as a wrapper for serving, not as a fine-tuning defence. Task scores and helpfulness fall with rate. Phrases
    decide what a refusal is: give those of the model.
Interacts: with any training. Only the user's text is perturbed, never the template or the system prompt. A prompt's perturbations
    depend on its text and the seed alone, so results depend neither on batches nor on workers. The counts in
    the record include the monitor's probes.
Deviations: at least one character or word is perturbed (official: none where rate * length is below 1). Insert takes its places in the
    untouched text (the official code's places shift as it inserts). Compared on 4 texts of 10 to 132 characters, 3 rates and 25 seeds, with
    the same random numbers: swap and patch give the very same texts, insert as many characters at other places. A tie is no majority of
    answered copies, so it is a refusal (as the official > 0.5). The answer returned is drawn with the prompt's own seed. Phrases are looked
    for in lower case (official: 13 beginnings, case-sensitive). ra_llm drops words, not tokens, since a defence sees texts only; its copies
    are asked in waves, which ends early with the same verdict as asking all.
"""

from __future__ import annotations

import hashlib
import math
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from strategies.base import Generate, Strategy, StrategyError

PHRASES = "sorry|i apologize|apologies|i cannot|i can't|i can not|i am not able|i'm not able|i am unable|i'm unable|as an ai|i must decline|i won't"
RATES = {"smoothllm": 0.1, "ra_llm": 0.3}
COPIES = {"smoothllm": 10, "ra_llm": 20}
WAVE = 5
"""Copies of ra_llm asked between two looks at whether its verdict stands."""


def swap(text: str, rate: float, draw: random.Random) -> str:
    """`text` with a share `rate` of its characters, rounded down (at least one), replaced by random printable ones. Empty text stays empty."""
    letters = list(text)
    for place in draw.sample(range(len(text)), _count(len(text), rate)):
        letters[place] = draw.choice(string.printable)
    return "".join(letters)


def patch(text: str, rate: float, draw: random.Random) -> str:
    """`text` with one run of a share `rate` of its characters, rounded down (at least one), replaced by random printable ones."""
    width = _count(len(text), rate)
    start = draw.randint(0, len(text) - width)
    return text[:start] + "".join(draw.choice(string.printable) for _ in range(width)) + text[start + width :]


def insert(text: str, rate: float, draw: random.Random) -> str:
    """`text` with a random printable character put before a share `rate` of its characters, rounded down (at least one); the rest is kept."""
    places = set(draw.sample(range(len(text)), _count(len(text), rate)))
    return "".join(draw.choice(string.printable) + letter if i in places else letter for i, letter in enumerate(text))


def drop(text: str, rate: float, draw: random.Random) -> str:
    """`text` without a share `rate` of its words, rounded down (at least one, never all), the others joined by single blanks."""
    words = text.split()
    gone = set(draw.sample(range(len(words)), min(_count(len(words), rate), max(0, len(words) - 1))))
    return " ".join(word for i, word in enumerate(words) if i not in gone)


def _count(length: int, rate: float) -> int:
    return min(length, max(1, math.floor(rate * length + 1e-9))) if rate > 0 else 0


PERTURBATIONS: dict[str, Callable[[str, float, random.Random], str]] = {"swap": swap, "patch": patch, "insert": insert, "drop": drop}


def copies_of(text: str, kind: str, rate: float, count: int, seed: int) -> list[str]:
    """`count` perturbed copies of `text`; each depends on (seed, text, its number) alone. kind: swap, patch, insert or drop."""
    return [PERTURBATIONS[kind](text, rate, _random(seed, text, number)) for number in range(count)]


def _random(seed: int, text: str, number: int) -> random.Random:
    return random.Random(hashlib.sha256(f"{seed}\0{number}\0{text}".encode()).digest())


def refused(answer: str, phrases: Sequence[str]) -> bool:
    """Whether one of `phrases` (lower case) stands anywhere in the answer, case and form of apostrophes aside. Empty answers: no."""
    text = " ".join(answer.lower().replace("\u2019", "'").split())
    return any(phrase in text for phrase in phrases)


def majority(verdicts: Sequence[bool], draw: random.Random) -> tuple[bool, int]:
    """(whether the prompt counts as refused, index of the copy whose answer is returned) from each copy's `refused`.

    Refused unless more than half of the copies were answered; the index is drawn among copies that agree. Raises ValueError without copies.
    """
    if not verdicts:
        raise ValueError("no copy was asked, so there is nothing to vote on")
    verdict = sum(not v for v in verdicts) * 2 <= len(verdicts)
    return verdict, draw.choice([i for i, v in enumerate(verdicts) if v == verdict])


def needed(copies: int, threshold: float) -> int:
    """Refused copies from which on ra_llm refuses: the least whole number that is a share `threshold` of `copies`, at least 1."""
    return max(1, math.ceil(threshold * copies - 1e-9))


class Perturbation(Strategy):
    """Votes over perturbed copies of every prompt."""

    name = "perturbation"
    changes_training = False

    @dataclass(frozen=True)
    class Config:
        form: Literal["smoothllm", "ra_llm"] = field(default="smoothllm", metadata={"help": "Majority of answers, or check by short answers."})
        kind: Literal["swap", "patch", "insert"] = field(default="swap", metadata={"help": "What smoothllm does to characters."})
        copies: int | None = field(
            default=None, metadata={"help": "Perturbed copies per prompt; 10 (smoothllm) or 20 (ra_llm) without it.", "max": 10_000}
        )
        rate: float | None = field(default=None, metadata={"help": "Share perturbed: of characters (0.1 without it), ra_llm of words (0.3)."})
        threshold: float = field(default=0.2, metadata={"help": "ra_llm: share of refused copies from which on the prompt is refused."})
        tokens: int = field(default=10, metadata={"help": "ra_llm: tokens generated per copy."})
        seed: int = field(default=0, metadata={"help": "Seed of the perturbations.", "max": 2**31 - 1})
        phrases: str = field(default=PHRASES, metadata={"help": "What marks a refusal, anywhere in an answer; separated by a bar."})
        refusal: str = field(default="Sorry, I cannot help with that.", metadata={"help": "What ra_llm answers when it refuses."})
        train: bool = field(default=True, metadata={"help": "False: no training, the defence alone around the untouched model."})

        def __post_init__(self):
            if self.copies is not None and self.copies < 1:
                raise StrategyError(f"perturbation.copies={self.copies} must be at least 1; for no defence leave the strategy out")
            if self.rate is not None and not 0 <= self.rate < 1:
                raise StrategyError(f"perturbation.rate={self.rate} must be at least 0 and below 1; the papers use 0.1 and 0.3")
            if not 0 < self.threshold <= 1:
                raise StrategyError(f"perturbation.threshold={self.threshold} must be above 0 and at most 1; the paper uses 0.2")
            if self.seed < 0:
                raise StrategyError(f"perturbation.seed={self.seed} is negative; use 0 to 2147483647")
            if self.tokens < 1:
                raise StrategyError(f"perturbation.tokens={self.tokens} must be at least 1")
            if not self.phrases.replace("|", "").strip():
                raise StrategyError("perturbation.phrases is empty, so nothing would ever count as a refusal; give some, separated by |")

    def __init__(self, config=None):
        super().__init__(config)
        knobs = self.config
        self.phrases = tuple(phrase.strip().lower() for phrase in knobs.phrases.split("|") if phrase.strip())
        self.copies = knobs.copies or COPIES[knobs.form]
        self.rate = RATES[knobs.form] if knobs.rate is None else knobs.rate
        self.asked = self.turned = 0

    @property
    def trains(self) -> bool:
        return self.config.train

    def wrap(self, generate: Generate) -> Generate:
        form = {"smoothllm": self._smooth, "ra_llm": self._checked}[self.config.form]

        def defended(prompts: Sequence[str], *, max_new_tokens: int | None = None) -> list[str]:
            self.asked += len(prompts)
            return form(generate, list(prompts), max_new_tokens)

        return defended

    def _smooth(self, generate: Generate, prompts: list[str], max_new_tokens: int | None) -> list[str]:
        """One answer per prompt: of a copy that agrees with the majority."""
        seed = self.config.seed
        asked = [copy for prompt in prompts for copy in copies_of(prompt, self.config.kind, self.rate, self.copies, seed)]
        answers = generate(asked, max_new_tokens=max_new_tokens)
        chosen = []
        for i, prompt in enumerate(prompts):
            own = answers[i * self.copies : (i + 1) * self.copies]
            verdict, index = majority([refused(answer, self.phrases) for answer in own], _random(seed, prompt, -1))
            self.turned += verdict
            chosen.append(own[index])
        return chosen

    def _checked(self, generate: Generate, prompts: list[str], max_new_tokens: int | None) -> list[str]:
        """The answer to the prompt itself, or the refusal where that answer or enough of the copies refuse."""
        answers = generate(prompts, max_new_tokens=max_new_tokens)
        limit = needed(self.copies, self.config.threshold)
        copies = {
            i: copies_of(prompt, "drop", self.rate, self.copies, self.config.seed)
            for i, prompt in enumerate(prompts) if not refused(answers[i], self.phrases)
        }  # fmt: skip
        counts = dict.fromkeys(copies, 0)
        for start in range(0, self.copies, WAVE):
            left = self.copies - start
            alive = [i for i, count in counts.items() if count < limit <= count + left]
            asked = [(i, copy) for i in alive for copy in copies[i][start : start + WAVE]]
            if not asked:
                break
            for (i, _), answer in zip(asked, generate([copy for _, copy in asked], max_new_tokens=self.config.tokens), strict=True):
                counts[i] += refused(answer, self.phrases)
        turned = {i for i, count in counts.items() if count >= limit}
        self.turned += len(turned)
        return [self.config.refusal if i in turned else answer for i, answer in enumerate(answers)]

    def facts(self):
        return {"prompts_defended": self.asked, "prompts_refused_by_vote": self.turned}
