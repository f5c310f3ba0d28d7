"""Which prompts of a suite, or evaluation rows, occur among the rows that a model is trained on: as they are, or nearly.

Two texts are the same where their letters and digits are: case, spacing, punctuation, accents, look-alike letters, characters that show
nothing, escapes and tags do not count (`folding`), so that keys are compared, as hashes. A prompt *occurs nearly* where its words, or words
spelt like them (`misspelt`), appear in a row close together and in its order, at least `NEAR` of them by weight, or `BAG` in any order. The
weight of a word is how rare it is among the prompts: prompts made from one pattern ("write a tutorial on how to ...") share common words only
and are no copies, while a copy with a word put in, left out or replaced keeps nearly all of its weight. A character of a language without
spaces (Chinese, Japanese, Thai ...) is a word here. Nothing is drawn at random and nothing depends on Python's own hash: the same texts give
the same answer everywhere. Texts are scanned once; time grows with the rows, memory with the prompts and 16 bytes a distinct row.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from orchestrator.data.folding import fold, plain, spaceless, split
from orchestrator.data.misspelt import Vocabulary

NEAR = 0.8
"""Share of a prompt's weight that must be found. One word put in leaves 1, one ordinary word of ten replaced about 0.9, the subject
replaced 0.6 to 0.75 (measured on published suites, docs/evaluation.md)."""
WHOLE = 0.9
"""The same for evaluation rows. Rows of one task are alike: of 100 SQL questions with their tables 43 hold 0.8 of some other row, 19 hold 0.9."""
BAG = 0.9
"""Share that must be found where the words stand in another order."""
LEAST = 4
"""Words that a prompt must have to be looked for nearly, or in the middle of longer texts: shorter ones occur by chance."""
SHORT = 2
"""Words that a prompt must have to be looked for, as it stands, as a sentence of a longer text."""
ANSWERED = 6
"""Words that a prompt must have to be looked for nearly in an answer: answers that decline repeat a few words of what was asked."""
RUN = 12
"""Letters of a prompt that is looked for in letters which stand alone, or in words run together."""
LEAST_PART = 5
"""Words of a row's prompt that is looked for, as it stands, inside a suite's (a request inside somebody's framing)."""
BACKGROUND = 2000
"""Rows that word counts are taken from, beside all prompts, evenly spaced."""
LONG = 48
"""Words above which order is checked by pairs of neighbours, not by the longest common sequence."""
SLACK = 2

_ENDS = re.compile(r"[.!?:;\n\"“”«»()\[\]。]+")


def units(text: str) -> list[str]:
    """Words in small letters without punctuation; single characters of languages without spaces. A sign between two numbers is a word."""
    return split(fold(text))


def key(words: Sequence[str], text: str = "") -> bytes:
    """16 bytes that are equal where letters and digits are; of a text without any (`words` empty), of its characters but white space."""
    whole = re.sub(r"(?<=\d) (?=\d)", "_", " ".join(words)).replace(" ", "") if words else "".join(text.split())
    return hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def size(words: Sequence[str]) -> float:
    """How many words; two characters of a language without spaces count as one."""
    return sum(0.5 if spaceless(word[0]) else 1.0 for word in words)


@dataclass(frozen=True)
class Text:
    """A text to look prompts up in, and where it is from."""

    row: int
    """Row of its file, counted from 1."""
    text: str
    prompt: bool = True
    """False for an answer: it is no copy as it stands, and prompts of few words are not looked for in it."""


@dataclass(frozen=True)
class Found:
    """What was found of one prompt."""

    exact: bool
    row: int
    """The first row that holds it."""


@dataclass
class _Prompt:
    """A distinct prompt, however often it is asked."""

    words: list[str]
    letters: str = ""
    """All words run together."""
    weights: dict[str, float] = field(default_factory=dict)
    shares: list[tuple[str, float]] = field(default_factory=list)
    """(word, its weight times its count), the heaviest first: what a text that lacks it loses."""
    total: float = 0.0
    need: float = 0.0
    """Weight that a near copy holds at least."""

    def lacks(self, present: dict[str, None]) -> bool:
        """Whether a text of these words lacks too much to hold the prompt."""
        left = self.total - self.need + 1e-9
        for word, share in self.shares:
            if word not in present:
                left -= share
                if left < 0:
                    return True
        return False


class Index:
    """Prompts to be looked for. `whole`: prompts of few words count as they stand only, and never one that holds a row's."""

    def __init__(self, prompts: Sequence[str], background: Iterable[str] = (), *, whole: bool = False):
        self.whole = whole
        self.of: list[int] = []
        """Distinct prompt of each prompt."""
        self._keys: dict[bytes, int] = {}
        self._prompts: list[_Prompt] = []
        for text in prompts:
            folded = fold(text)
            words = split(folded)
            digest = key(words, text)
            if digest not in self._keys:
                self._keys[digest] = len(self._prompts)
                self._prompts.append(_Prompt(plain(folded), "".join(words)))
            self.of.append(self._keys[digest])
        self._vocabulary = Vocabulary(word for prompt in self._prompts for word in prompt.words)
        self._starts: dict[str, list[int]] = {}
        for number, prompt in enumerate(self._prompts):
            if len(prompt.letters) >= RUN and size(prompt.words) >= LEAST and not any(map(spaceless, prompt.letters)):
                self._starts.setdefault(prompt.letters[:RUN], []).append(number)
        self._postings = self._posted(self._weigh(background))
        self.found: dict[int, Found] = {}
        self._seen: set[tuple[bytes, bool]] = set()
        self._parts: dict[bytes, dict[int, int]] = {}
        """First LEAST_PART words of a short row prompt -> {its length in words: ...}; filled while rows are scanned."""
        self._part_rows: dict[bytes, int] = {}

    def _weigh(self, background: Iterable[str]) -> Counter[str]:
        """Give every word its weight; returns in how many prompts and rows each occurs."""
        counts: Counter[str] = Counter()
        documents = 0
        for words in (*(p.words for p in self._prompts), *(self._vocabulary.of(plain(fold(text))) for text in background)):
            counts.update(set(words))
            documents += 1
        for prompt in self._prompts:
            prompt.weights = {word: math.log1p(documents / counts[word]) for word in prompt.words}
            repeats = Counter(prompt.words)
            prompt.shares = sorted(((word, prompt.weights[word] * n) for word, n in repeats.items()), key=lambda s: (-s[1], s[0]))
            prompt.total = sum(share for _, share in prompt.shares)
            prompt.need = (WHOLE if self.whole else NEAR) * prompt.total
        return counts

    def _posted(self, counts: Counter[str]) -> dict[str, list[int]]:
        """Rare word -> prompts: of each prompt as many of its rarest words as no near copy can lack together."""
        postings: dict[str, list[int]] = {}
        for number, prompt in enumerate(self._prompts):
            if size(prompt.words) < (LEAST if self.whole else SHORT):
                continue
            lost = 0.0
            for word, share in sorted(prompt.shares, key=lambda s: (counts[s[0]], s[0])):
                postings.setdefault(word, []).append(number)
                lost += share
                if lost > prompt.total - prompt.need + 1e-9:
                    break
        return postings

    def scan(self, texts: Iterable[Text]) -> int:
        """Look every text up; returns how many distinct rows hold a prompt as it is."""
        rows: set[int] = set()
        for text in texts:
            folded = fold(text.text)
            own = split(folded)
            digest = key(own, text.text)
            known = self._keys.get(digest) if text.prompt else None
            if known is not None:
                rows.add(text.row)
                self._note(known, True, text.row)
            if (digest, text.prompt) in self._seen:
                continue
            self._seen.add((digest, text.prompt))
            words = self._vocabulary.of(plain(folded))
            self._near(words, folded, text)
            self._run_together(own, text.row)
            if text.prompt and not self.whole and size(words) >= LEAST_PART:
                self._parts.setdefault(_gram(words[:LEAST_PART]), {}).setdefault(len(words), text.row)
                self._part_rows.setdefault(key(words), text.row)
        if not self.whole:
            self._inside()
        return len(rows)

    def _note(self, number: int, exact: bool, row: int) -> None:
        known = self.found.get(number)
        if known is None or exact and not known.exact:
            self.found[number] = Found(exact, row)

    def _near(self, words: list[str], folded: str, text: Text) -> None:
        """Prompts that occur in a text nearly, or as a part of it. One that was found before is not looked for again."""
        present = dict.fromkeys(words)
        candidates = {number: None for word in present if word in self._postings for number in self._postings[word]}
        for number in candidates:
            prompt = self._prompts[number]
            if number in self.found or prompt.lacks(present):
                continue
            if size(prompt.words) < LEAST:
                if text.prompt and _holds(words, prompt.words) and self._stands_out(prompt.words, words, folded):
                    self._note(number, False, text.row)
            elif not text.prompt and len(prompt.words) < ANSWERED:
                if _holds(words, prompt.words):
                    self._note(number, False, text.row)
            elif _occurs(prompt, words, math.ceil(1.5 * len(prompt.words)) + SLACK):
                self._note(number, False, text.row)

    def _stands_out(self, few: list[str], words: list[str], folded: str) -> bool:
        """Whether a few words that a text holds are most of it, or begin or end a sentence; two words must be one."""
        if size(few) > SHORT and len(words) <= 4 * len(few):
            return True
        for part in _ENDS.split(folded):
            own = self._vocabulary.of(plain(part))
            if own == few or size(few) > SHORT and (own[: len(few)] == few or own[-len(few) :] == few):
                return True
        return False

    def _run_together(self, words: list[str], row: int) -> None:
        """Prompts in letters that stand alone (l.i.k.e. t.h.i.s) or in words without spaces."""
        for alone, group in itertools.groupby(words, lambda word: len(word) == 1 and not spaceless(word)):
            for letters in ["".join(group)] if alone else [word for word in group if len(word) >= 2 * RUN]:
                for i in range(len(letters) - RUN + 1):
                    for number in self._starts.get(letters[i : i + RUN], ()):
                        if number not in self.found and letters.startswith(self._prompts[number].letters, i):
                            self._note(number, False, row)

    def _inside(self) -> None:
        """Prompts that hold a row's whole prompt, as it stands."""
        for number, prompt in enumerate(self._prompts):
            if number in self.found or len(prompt.words) <= LEAST_PART:
                continue
            for start in range(len(prompt.words) - LEAST_PART + 1):
                lengths = self._parts.get(_gram(prompt.words[start : start + LEAST_PART]))
                for length in lengths or ():
                    part = prompt.words[start : start + length]
                    row = self._part_rows.get(key(part)) if len(part) == length else None
                    if row is not None:
                        self._note(number, False, row)


def _gram(words: Sequence[str]) -> bytes:
    return hashlib.blake2b(" ".join(words).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _holds(words: list[str], few: list[str]) -> bool:
    return any(words[i : i + len(few)] == few for i in range(len(words) - len(few) + 1))


def _occurs(prompt: _Prompt, words: list[str], longest: int) -> bool:
    """Whether some stretch of at most `longest` words holds enough of the prompt's weight, in its order."""
    matched = [(i, word) for i, word in enumerate(words) if word in prompt.weights]
    wanted, need = Counter(prompt.words), prompt.need - 1e-9
    inside: Counter[str] = Counter()
    weight, first = 0.0, 0
    for last, (position, word) in enumerate(matched):
        inside[word] += 1
        weight += prompt.weights[word] if inside[word] <= wanted[word] else 0.0
        while position - matched[first][0] >= longest:
            gone = matched[first][1]
            weight -= prompt.weights[gone] if inside[gone] <= wanted[gone] else 0.0
            inside[gone] -= 1
            first += 1
        if weight >= BAG * prompt.total and len(wanted) > LEAST:
            return True
        if weight >= need and _in_order(prompt, [w for _, w in matched[first : last + 1]]) >= need:
            return True
    return False


def _in_order(prompt: _Prompt, words: list[str]) -> float:
    """Weight of the heaviest common subsequence of prompt and words; for long ones, of the words beside a neighbour of theirs."""
    if len(prompt.words) > LONG:
        pairs = set(zip(words, words[1:], strict=False))
        own = prompt.words
        beside = [(i and (own[i - 1], own[i]) in pairs) or (i + 1 < len(own) and (own[i], own[i + 1]) in pairs) for i in range(len(own))]
        return sum(prompt.weights[word] for word, kept in zip(own, beside, strict=True) if kept)
    best = [0.0] * (len(words) + 1)
    for own in prompt.words:
        gain, diagonal = prompt.weights[own], 0.0
        for j, other in enumerate(words, start=1):
            above = best[j]
            best[j] = diagonal + gain if own == other else max(above, best[j - 1])
            diagonal = above
    return best[-1]
