"""One model over all recipes: Gaussian processes of the violation of each kind of limit and of the score, and what they would try next.

Kernel between the points (i, x) and (j, y), i and j recipes:

    K = k(rate; .3) * (.2 k(shared; .45) + .8 [i = j] k(own; .45)),   k(d; l) = exp(-d^2 / (2 l^2))

so that what a learning rate, a rank or a freeze range does in one recipe is believed, a fifth, of every other that has it, and the rest of what
a recipe does is its own. Scales are fixed: with 10 to 60 trials nothing can be fitted (halving or doubling them changes little).

Constraints are told as (upper end of the interval - limit) and modelled as asinh(value / limit), which is a log-odds near the limit and does
not care how far beyond it a hopeless trial is. A complete trial is known with a standard deviation of .35 there, one that ended early, whose
violation is extrapolated from its probes, with .8, and has no score. Trials that still run are taken at their predicted mean: they narrow the
posterior where they are and shift nothing, so that the next one goes elsewhere.

Asked is the point of the largest (expected improvement of the score x probability that every limit is kept / expected cost): Gardner et al. 2014,
"Bayesian optimization with inequality constraints"; with noise, the best so far is the best posterior mean among what is feasible (Letham et al.
2019). Everything here is a pure function of its arguments and of `rng`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.special import ndtr

from orchestrator.search.joint_points import Coordinates, Places, drawn, near
from orchestrator.search.points import key

RATE_SCALE, SCALE, ACROSS = 0.3, 0.45, 0.2
"""Length scales of the rate and of other parameters; share of what is learnt that holds for other recipes."""
VIOLATION_SD, SCORE_FLOOR = 1.6, 0.05
"""Prior standard deviation of a violation (asinh of limits); least standard deviation that scores are taken to have."""
COMPLETE, ENDED, SCORE_NOISE = 0.35, 0.8, 0.2
"""Noise: of a complete trial's violation, of one extrapolated from probes, of a score in standard deviations of the scores."""
CLEAR = 1.0
"""A violation (asinh of limits) from which a training is taken to end early."""
RANDOM, NEAR = 50, 20
"""Points looked at for each recipe: random ones and near ones."""
SAMPLES = 200
"""Draws of the posterior behind the chance that a recipe holds the best."""


@dataclass(frozen=True)
class Known:
    """What is known of one trial."""

    recipe: str
    params: Mapping[str, Any]
    """Of every parameter its space samples."""
    violations: Mapping[str, float] = field(default_factory=dict)
    """Kind of limit -> largest (upper end - limit) / limit of that kind; a kind that was not measured is left out."""
    score: float | None = None
    running: bool = False
    ended_early: bool = False

    @property
    def feasible(self) -> bool:
        """Measured in full, and every limit kept."""
        return self.score is not None and bool(self.violations) and all(value <= 0 for value in self.violations.values())


@dataclass(frozen=True)
class Recipe:
    """What may be asked of one recipe."""

    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Values that the next trial must have (it shares the training of an earlier one)."""
    seen: frozenset[str] = frozenset()
    """Points not to be asked again, as `key`s."""
    cost: float = 1.0
    """Of a trial that goes to its end."""
    cost_ended: float = 1.0
    """Of one that ends early; the same where none does."""


@dataclass(frozen=True)
class Proposal:
    """The next trial."""

    recipe: str
    params: dict[str, Any]
    gain: float
    """Expected improvement x probability of feasibility / cost; in standard deviations of the scores."""
    feasible: float
    """Probability that every limit is kept."""


def kernel(a: Coordinates, b: Coordinates) -> np.ndarray:
    """(N, M) prior correlations, 1 between a point and itself."""
    same = a.recipe[:, None] == b.recipe[None, :]
    rate = np.exp(-((a.rate[:, None] - b.rate[None, :]) ** 2) / (2 * RATE_SCALE**2))
    return rate * (ACROSS * _rbf(a.shared, b.shared) + (1 - ACROSS) * same * _rbf(a.own, b.own))


def _rbf(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squares = ((a[:, None, :] - b[None, :, :]) ** 2).sum(axis=2)
    return np.exp(-squares / (2 * SCALE**2))


@dataclass(frozen=True)
class Output:
    """Measurements of one quantity: (N,) places in the list of trials, values, standard deviations of their noise; prior mean and deviation."""

    rows: np.ndarray
    values: np.ndarray
    noise: np.ndarray
    mean: float
    sd: float


def posterior(output: Output, pending: np.ndarray, prior: np.ndarray, cross: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean (M,), covariance (M, M)) of the quantity at M points.

    `prior` (N, N), `cross` (M, N), `at` (M, M): kernel among trials, between points and trials, among points; `pending` (P,): places of the
    trials that run, taken at their predicted mean, with the noise of a complete one. Without any measurement: the prior.
    """
    seen, everything = output.rows, np.concatenate([output.rows, pending]).astype(int)
    mean, covariance = np.full(len(at), output.mean), output.sd**2 * at
    if not len(everything):
        return mean, covariance
    if len(seen):
        factor = cho_factor(output.sd**2 * prior[np.ix_(seen, seen)] + np.diag(output.noise**2))
        mean = output.mean + output.sd**2 * cross[:, seen] @ cho_solve(factor, output.values - output.mean)
    usual = float(np.min(output.noise)) if len(seen) else COMPLETE
    noise = np.concatenate([output.noise, np.full(len(pending), usual)])
    factor = cho_factor(output.sd**2 * prior[np.ix_(everything, everything)] + np.diag(noise**2))
    gain = output.sd**2 * cross[:, everything]
    return mean, covariance - gain @ cho_solve(factor, gain.T)


def improvement(mean: np.ndarray, sd: np.ndarray, best: float) -> np.ndarray:
    """Expected improvement over `best`, E max(f - best, 0), for f normal: (M,). `sd` of 0: what the mean exceeds it by."""
    sd = np.maximum(sd, 1e-12)
    z = (mean - best) / sd
    return np.maximum((mean - best) * ndtr(z) + sd * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi), 0.0)


class Joint:
    """The model, given what is known. `violations`: kinds of limits, in order."""

    def __init__(self, spaces: Mapping[str, Mapping[str, Any]], kinds: Sequence[str], known: Sequence[Known]):
        self.places, self.kinds, self.known = Places(spaces), tuple(kinds), list(known)
        self._at = self.places.of([(one.recipe, one.params) for one in self.known])
        self._prior = kernel(self._at, self._at)
        self._pending = np.array([row for row, one in enumerate(self.known) if one.running], dtype=int)
        scores = [one.score for one in self.known if one.score is not None]
        self._middle = float(np.mean(scores)) if scores else 0.0
        inside = all(0 <= score <= 1 for score in scores)  # a share; a negative loss has a scale of its own
        self._spread = max(float(np.std(scores)) if scores else 0.0, SCORE_FLOOR if inside else 1e-6) or 1.0

    def violation(self, kind: str) -> Output:
        """Measurements of one kind of limit, as asinh of limits. The prior mean is that of what was measured, with two imagined ones at the
        limit: until something is known, half of everything is feasible."""
        rows = [row for row, one in enumerate(self.known) if kind in one.violations]
        values = np.arcsinh([self.known[row].violations[kind] for row in rows])
        noise = np.array([ENDED if self.known[row].ended_early else COMPLETE for row in rows])
        return Output(np.array(rows, dtype=int), values, noise, float(values.sum() / (len(values) + 2)), VIOLATION_SD)

    def scores(self) -> Output:
        """Measurements of the score, standardised."""
        rows = [row for row, one in enumerate(self.known) if one.score is not None]
        values = np.array([(self.known[row].score - self._middle) / self._spread for row in rows])
        return Output(np.array(rows, dtype=int), values, np.full(len(rows), SCORE_NOISE), 0.0, 1.0)

    def at(self, points: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[list[tuple[np.ndarray, np.ndarray]], tuple[np.ndarray, np.ndarray]]:
        """([(mean, covariance) of each kind of violation], (mean, covariance) of the standardised score) at M points."""
        there = self.places.of(points)
        grams = (self._prior, kernel(there, self._at), kernel(there, there))
        return [posterior(self.violation(kind), self._pending, *grams) for kind in self.kinds], posterior(self.scores(), self._pending, *grams)

    @functools.cached_property
    def best(self) -> float | None:
        """Largest posterior mean of the (standardised) score among trials that were feasible and whose limits are rather kept than not, further
        seeds included; None without one."""
        rows = [row for row, one in enumerate(self.known) if one.feasible]
        if not rows:
            return None
        violations, (mean, _) = self.at([(self.known[row].recipe, self.known[row].params) for row in rows])
        likely = kept(violations) >= 0.5
        return float(mean[likely].max()) if likely.any() else None

    def propose(self, recipes: Mapping[str, Recipe], rng: np.random.Generator) -> Proposal | None:
        """The next trial among these recipes; None where no point is left that is new."""
        best = self.best
        found: list[Proposal] = []
        for name, recipe in recipes.items():
            points = self.candidates(name, recipe, rng)
            if not points:
                continue
            violations, (mean, covariance) = self.at([(name, point) for point in points])
            chance = kept(violations)
            gain = improvement(mean, np.sqrt(np.maximum(np.diag(covariance), 0.0)), -2.0 if best is None else best)
            value = gain * chance / expected_cost(violations, recipe)
            row = int(np.argmax(value))
            found.append(Proposal(name, points[row], float(value[row]), float(chance[row])))
        return max(found, key=lambda one: one.gain, default=None)

    def candidates(self, name: str, recipe: Recipe, rng: np.random.Generator) -> list[dict[str, Any]]:
        """New points of a recipe: random ones, and ones near its three best by posterior mean of what is feasible."""
        space = self.places.spaces[name]
        points = [drawn(space, rng, recipe.fixed) for _ in range(RANDOM)]
        own = [one.params for one in self.known if one.recipe == name]
        if own:
            violations, (mean, _) = self.at([(name, params) for params in own])
            order = np.argsort(-(mean + 3.0) * kept(violations), kind="stable")[:3]
            points += [near(space, own[order[turn % len(order)]], rng, recipe.fixed) for turn in range(NEAR)]
        fresh: dict[str, dict[str, Any]] = {}
        for point in points:
            if (text := key(point)) not in recipe.seen:
                fresh.setdefault(text, point)
        return list(fresh.values())

    def chance_of_best(self, name: str, rng: np.random.Generator) -> float:
        """Probability that some point of the recipe is feasible and better than the best so far, by draws of the posterior over random and near
        points; 1 while nothing feasible is known."""
        best = self.best
        points = [(name, point) for point in self.candidates(name, Recipe(), rng)]
        if best is None or not points:
            return 1.0
        violations, score = self.at(points)
        fine = np.ones((SAMPLES, len(points)), dtype=bool)
        for mean, covariance in violations:
            fine &= _draws(mean, covariance, rng) <= 0
        return float(np.mean((fine & (_draws(*score, rng) > best)).any(axis=1)))


def kept(violations: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """(M,) probability that no limit is broken, the kinds taken as independent."""
    chance: Any = 1.0
    for mean, covariance in violations:
        chance = chance * ndtr(-mean / np.sqrt(np.maximum(np.diag(covariance), 1e-12)))
    return chance


def expected_cost(violations: Sequence[tuple[np.ndarray, np.ndarray]], recipe: Recipe) -> np.ndarray | float:
    """Of a trial at each point: between that of one that goes to its end and of one that ends early, by the chance of a clear violation."""
    if not violations or recipe.cost_ended >= recipe.cost:
        return recipe.cost
    mean, covariance = violations[0]
    clear = ndtr((mean - CLEAR) / np.sqrt(np.maximum(np.diag(covariance), 1e-12) + COMPLETE**2))
    return recipe.cost - (recipe.cost - recipe.cost_ended) * clear


def _draws(mean: np.ndarray, covariance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(SAMPLES, M) draws of a normal distribution whose covariance may be singular: a millionth of its largest variance is added."""
    room = 1e-6 * float(np.max(np.diag(covariance), initial=0.0)) + 1e-12
    root = np.linalg.cholesky((covariance + covariance.T) / 2 + room * np.eye(len(mean)))
    return mean + rng.standard_normal((SAMPLES, len(mean))) @ root.T
