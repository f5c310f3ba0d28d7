"""Seeds: which a user may give, and how larger numbers made of them become what a generator takes."""

from __future__ import annotations

import hashlib

LARGEST = 2**31 - 1
"""Largest seed anywhere in a config or on the command line: numpy, torch, Optuna and random all take it."""
MOST = 1000
"""Most seeds of one experiment: each is a training of every finalist."""


def of_32_bits(number: int) -> int:
    """A seed in 0..2**32-1, as numpy's RandomState (and so Optuna's samplers) wants it: the number itself where it is one, else the
    first 32 bits of its hash. The same in every process."""
    if 0 <= number < 2**32:
        return number
    return int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:4], "big")


def of_64_bits(number: int) -> int:
    """A seed in 0..2**63-1, as torch wants it: the number itself where it is one, else 63 bits of its hash."""
    if 0 <= number < 2**63:
        return number
    return int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:8], "big") >> 1
