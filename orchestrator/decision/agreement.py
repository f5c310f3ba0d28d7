"""How far two judges agree on the same answers: raw agreement, and Cohen's kappa, which takes away what chance would give."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Agreement:
    """Two judges on n answers."""

    n: int
    agreement: float
    """Share of answers with the same label, 0..1; NaN for none."""
    kappa: float
    """Cohen's kappa, -1..1; NaN where both judges gave one and the same label throughout, as chance then explains everything."""
    lower: float
    upper: float
    """95 % interval of kappa (large-sample, Fleiss, Cohen and Everitt 1969), NaN where kappa is."""

    def text(self) -> str:
        """`agree 0.940, kappa 0.880 [0.800, 0.960] n=100`."""
        if not self.n:
            return "not measured"
        if math.isnan(self.kappa):
            return f"agree {self.agreement:.3f}, kappa not defined (one label throughout) n={self.n}"
        return f"agree {self.agreement:.3f}, kappa {self.kappa:.3f} [{self.lower:.3f}, {self.upper:.3f}] n={self.n}"


def agreement(first: Sequence[Hashable], second: Sequence[Hashable]) -> Agreement:
    """Agreement of two label sequences of the same length N. N = 0 gives NaN throughout. Raises ValueError for unequal lengths.

    kappa = (p_o - p_e) / (1 - p_e), p_e from the marginals (Cohen 1960).
    """
    if len(first) != len(second):
        raise ValueError(f"two judges on the same answers need equal lengths, got {len(first)} and {len(second)}")
    n = len(first)
    if not n:
        return Agreement(0, math.nan, math.nan, math.nan, math.nan)
    joint = Counter(zip(first, second, strict=True))
    rows, columns = Counter(first), Counter(second)
    labels = set(rows) | set(columns)
    observed = sum(joint[label, label] for label in labels) / n
    expected = sum(rows[label] * columns[label] for label in labels) / n**2
    if expected >= 1:
        return Agreement(n, observed, math.nan, math.nan, math.nan)
    kappa = (observed - expected) / (1 - expected)
    half = 1.96 * _standard_error(joint, rows, columns, n, observed, expected)
    return Agreement(n, observed, kappa, max(-1.0, kappa - half), min(1.0, kappa + half))


def _standard_error(joint: Counter, rows: Counter, columns: Counter, n: int, observed: float, expected: float) -> float:
    """Fleiss, Cohen and Everitt (1969), equation 13: large-sample standard error of kappa, from shares."""
    kappa = (observed - expected) / (1 - expected)
    total = 0.0
    for (row, column), count in joint.items():
        share = count / n
        if row == column:
            total += share * (1 - (rows[row] + columns[row]) / n * (1 - kappa)) ** 2
        else:
            total += (1 - kappa) ** 2 * share * ((columns[row] + rows[column]) / n) ** 2
    variance = total - (kappa - expected * (1 - kappa)) ** 2
    return math.sqrt(max(variance, 0.0) / n) / (1 - expected)
