"""Words as words of a vocabulary that they are spelt like: letters swapped, one letter more, less or other, i for l."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

KEPT = 50_000
"""Words of the vocabulary that are found with another letter, and words of texts that are remembered: bounds the memory."""
EDITED = 5
"""Letters of a word that may have one more or less; one more than this for another one. Shorter ones may have letters in another order."""


class Vocabulary:
    """Words to be recognised, the first ones first where several are spelt alike. A word of the vocabulary stays itself."""

    def __init__(self, words: Iterable[str]):
        self._own = dict.fromkeys(words)
        self._known: dict[str, str] = {}
        self._other_order: dict[str, str] = {}
        self._upright: dict[str, str] = {}
        self._shorter: dict[str, str] = {}
        for number, word in enumerate(self._own):
            if not word.isalpha() or len(word) < 3 or number >= KEPT:
                continue
            self._other_order.setdefault(_ordered(word), word)
            self._upright.setdefault(word.replace("l", "i"), word)
            if len(word) >= EDITED:
                for less in _without_one(word):
                    self._shorter.setdefault(less, word)

    def of(self, words: Iterable[str]) -> list[str]:
        """Each word as the one of the vocabulary that it is or is spelt like, or as it is."""
        own, known = self._own, self._known
        return [word if word in own else known[word] if word in known else self._look(word) for word in words]

    def _look(self, word: str) -> str:
        found = word
        if len(word) >= 3 and word.isalpha():
            found = self._other_order.get(_ordered(word)) or self._upright.get(word.replace("l", "i")) or self._edited(word) or word
        if len(self._known) >= 4 * KEPT:
            self._known.clear()
        self._known[word] = found
        return found

    def _edited(self, word: str) -> str | None:
        if not EDITED - 1 <= len(word) <= 40:
            return None
        found = self._shorter.get(word)
        if found is None and len(word) > EDITED:
            for less in _without_one(word):
                if less in self._own and len(less) >= EDITED:
                    return less
                other = self._shorter.get(less)
                if other is not None and len(other) == len(word) and other[0] == word[0]:
                    found = found or other
        return found


def _ordered(word: str) -> str:
    return word[0] + "".join(sorted(word[1:]))


def _without_one(word: str) -> Iterator[str]:
    for i in range(len(word)):
        yield word[:i] + word[i + 1 :]
