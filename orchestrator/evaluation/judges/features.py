"""An answer as the numbers a learnt judge looks at: hashed words, pairs and triples of words, and pieces of words of its opening.

Pure text to numbers; the same in every process and on every machine (CRC-32, no seed of Python's own hash).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

WHOLE, OPENING, FIRST, CHARACTERS = 160, 48, 14, 160
"""Words that are looked at at all; whose order is; whose order at the very beginning is; characters whose pieces are."""
_WORD = re.compile(r"[a-z']+|\d+|[^\sa-z\d]")


def words(text: str) -> list[str]:
    """Words, numbers and signs of a folded text in lower case, the first WHOLE."""
    return _WORD.findall(text.lower())[:WHOLE]


def names(text: str) -> Iterator[str]:
    """Names of the features of a folded text, some of them twice; none for an empty one."""
    found = words(text)
    opening = found[:OPENING]
    for size in (1, 2, 3):
        for i in range(len(opening) - size + 1):
            gram = " ".join(opening[i : i + size])
            yield f"o{size} {gram}"
            if i < FIRST:
                yield f"s{size} {gram}"
    for i in range(min(3, len(opening))):
        yield f"p{i} {' '.join(opening[: i + 1])}"
    beginning = text.lower()[:CHARACTERS]
    for size in (4, 5):
        for i in range(len(beginning) - size + 1):
            yield f"c {beginning[i : i + size]}"
    yield from (f"w {word}" for word in found)
    yield from (f"b {first} {second}" for first, second in zip(found, found[1:], strict=False))


def places(text: str, size: int) -> list[int]:
    """Rising places, 0..size - 1, of the features of a folded text. Each counts 1 / sqrt(len(places))."""
    return sorted({zlib.crc32(name.encode()) % size for name in names(text)})
