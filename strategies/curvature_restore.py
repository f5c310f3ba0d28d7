"""Restore safety where the task is flat: move the trained weights against harm, along what the task's curvature lets through.

Stage: after training.
Paper: Bach et al., "Curvature-Aware Safety Restoration in LLMs Fine-Tuning", TMLR 2026, arXiv 2511.18039 (abstract read, formulas not).
Reference: no code was found; the formulas below are a reconstruction.
Idea: fine-tuned models keep the geometry of the loss on harmful content, so that loss can be raised again without touching the task:
    d = (H + lambda I)^-1 g, with g the gradient of the loss on harmful answers (to ascend) or on refusals (to descend), H the curvature of
    the task's loss. d is scaled to a trust radius and halved until the task's loss stays within tolerance and the goal improves.
Knobs: objective - refusal (descend on refusals), harmful (ascend on harmful answers, the paper's), both (their difference). solver -
    diagonal (empirical Fisher), cg (conjugate gradients on exact Hessian products), lbfgs (two-loop recursion on pairs along the way, the
    paper's kind). damping - lambda as a share of the mean diagonal of H. iterations - of cg, or pairs of lbfgs. radius - length of the
    whole path, as a share of the adapters' norm or of what training changed; 0 leaves the model. steps - of the path. tolerance - rise of
    the task's loss allowed in all, as a share of it or of 1 nat, whichever is larger. cap - loss on harmful answers, per token, above
    which it is not raised further. num_rows - rows of each kind.
Cost: steps x (num_rows harmful + curvature) backward passes: diagonal num_rows, lbfgs 2 x iterations x num_rows, cg twice that. Memory: a
    few float32 copies of what was trained (cg 4, lbfgs 2 x iterations). Minutes for adapters, once per trial.
Needs: safety rows (safety.data) for objective=refusal and both; harmful answers (column rejected, or safety.harmful_data) for
    objective=harmful and both.
Limits: ascending on harmful answers without a cap ends in gibberish, which is no refusal. The task's loss is held on training rows only.
    What lies in directions the task needs is not restored.
Interacts: moves what training moved (adapters, or weights that are not frozen). Trials that differ in its knobs alone share a training. Acts
    on the gathered model, so every ZeRO stage, each worker repeating it. cg needs sdpa or eager attention.
Deviations: reconstruction from the abstract. The default descends on refusals, which cannot end in gibberish. Damping also stands for
    the null directions that B A has in adapters; directions of no or negative curvature end cg and are skipped by lbfgs. The curvature is
    that of at most num_rows task rows. Radius, tolerance, cap and back-tracking are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from strategies import after, gradients, rows, trying
from strategies.base import Example, Strategy, StrategyError, TrainingData
from strategies.gradients import Gradients

Product = Callable[[Gradients], Gradients]
"""v -> H v."""
HALVINGS = 10
"""Times a step is halved before the path ends: the direction leads uphill, but on a rough loss only over a short way."""
SHIFT = 1e-2
"""Length of the shift by which lbfgs measures curvature, as a share of what training changed."""


def diagonal(gradient: Gradients, fisher: Gradients, damping: float) -> dict[str, Tensor]:
    """g / (F + damping), element by element. {name: tensor} each; raises ValueError where damping is not above 0."""
    _positive(damping)
    return {name: part / (fisher[name] + damping) for name, part in gradient.items()}


def conjugate_gradients(product: Product, gradient: Gradients, damping: float, iterations: int, accuracy: float = 1e-6) -> dict[str, Tensor]:
    """x with (H + damping I) x = g after at most `iterations` steps, or when the residual is `accuracy` of g.

    Stops at a direction of non-positive curvature with what it has; where that is the first one, with g / damping. A zero gradient gives zero.
    """
    _positive(damping)
    x = {name: torch.zeros_like(part) for name, part in gradient.items()}
    residual, search = dict(gradient), dict(gradient)
    start = left = gradients.dot(residual, residual)
    for i in range(iterations):
        if left <= accuracy**2 * start:
            break
        curved = gradients.axpy(damping, search, product(search))
        bend = gradients.dot(search, curved)
        if bend <= 0:
            return gradients.linear([(1 / damping, gradient)]) if i == 0 else x
        step = left / bend
        x, residual = gradients.axpy(step, search, x), gradients.axpy(-step, curved, residual)
        before, left = left, gradients.dot(residual, residual)
        search = gradients.axpy(left / before, search, residual)
    return x


def two_loop(gradient: Gradients, pairs: Sequence[tuple[Gradients, Gradients]], start: float) -> dict[str, Tensor]:
    """The L-BFGS estimate of H^-1 g from pairs (s, y = H s), oldest first; those with s.y <= 0 are skipped.

    The inverse Hessian it starts from is (s.y / y.y) I of the last pair kept, or `start` I where none is.
    """
    kept = [(s, y, gradients.dot(s, y)) for s, y in pairs]
    kept = [(s, y, sy) for s, y, sy in kept if sy > 0]
    q, alphas = dict(gradient), []
    for s, y, sy in reversed(kept):
        alphas.append(gradients.dot(s, q) / sy)
        q = gradients.axpy(-alphas[-1], y, q)
    scale = kept[-1][2] / gradients.dot(kept[-1][1], kept[-1][1]) if kept else start
    r = gradients.linear([(scale, q)])
    for (s, y, sy), alpha in zip(kept, reversed(alphas), strict=True):
        r = gradients.axpy(alpha - gradients.dot(y, r) / sy, s, r)
    return r


def lbfgs(product: Product, gradient: Gradients, damping: float, history: int) -> dict[str, Tensor]:
    """(H + damping I)^-1 g by the two-loop recursion; the k-th of `history` pairs is taken along the estimate from the k - 1 before it."""
    _positive(damping)
    pairs: list[tuple[Gradients, Gradients]] = []
    found = gradients.linear([(1 / damping, gradient)])
    for _ in range(history):
        size = gradients.norm(found)
        if size == 0:
            break
        s = gradients.linear([(1 / size, found)])
        pairs.append((s, gradients.axpy(damping, s, product(s))))
        found = two_loop(gradient, pairs, 1 / damping)
    return found


def direction(gradient: Gradients, solver: str, damping: float, *, fisher: Gradients | None = None, product: Product | None = None,
              iterations: int = 10) -> dict[str, Tensor]:  # fmt: skip
    """(H + damping I)^-1 g as {name: tensor}, not scaled. `diagonal` takes H's diagonal as `fisher`, `cg` and `lbfgs` take `product`
    (v -> H v). Where the estimate points away from g (H far from positive), g itself is returned, so that a step along it always helps.
    """
    if solver == "diagonal":
        found = diagonal(gradient, fisher, damping)
    else:
        found = (conjugate_gradients if solver == "cg" else lbfgs)(product, gradient, damping, iterations)
    return found if gradients.dot(found, gradient) > 0 else dict(gradient)


def _positive(damping: float) -> None:
    if not damping > 0:
        raise ValueError(f"damping={damping} must be above 0: the curvature of adapters is singular")


class CurvatureRestore(Strategy):
    """Steps against harm, weighed by the inverse curvature of the task."""

    name = "curvature_restore"
    needs = frozenset({"safety", "harmful"})
    changes_training = False
    merges = True
    moves_outside = True

    @dataclass(frozen=True)
    class Config:
        objective: Literal["refusal", "harmful", "both"] = field(
            default="refusal", metadata={"help": "`refusal`: descend on refusals; `harmful`: ascend on harmful answers (paper); `both`."}
        )
        solver: Literal["diagonal", "cg", "lbfgs"] = field(default="diagonal", metadata={"help": "How the inverse curvature is applied."})
        damping: float = field(default=0.1, metadata={"help": "Added to the curvature, as a share of its mean diagonal."})
        iterations: int = field(default=10, metadata={"help": "Iterations of cg, or pairs of lbfgs."})
        radius: float = field(default=0.3, metadata={"help": "Length of the whole path, as a share of what training changed; 0 for none."})
        steps: int = field(default=4, metadata={"help": "Steps of the path, each with a gradient and a curvature of its own."})
        tolerance: float = field(default=0.02, metadata={"help": "Rise of the task's loss allowed, as a share of it (of 1 nat where smaller)."})
        cap: float = field(default=5.0, metadata={"help": "Loss on harmful answers above which it is not raised further."})
        num_rows: int = field(default=64, metadata={"help": "Rows of each kind: task, refusals, harmful answers."})

        def __post_init__(self):
            for knob, least in (("radius", 0), ("tolerance", 0), ("iterations", 1), ("steps", 1), ("num_rows", 1)):
                if getattr(self, knob) < least:
                    raise StrategyError(f"curvature_restore.{knob}={getattr(self, knob)} must be at least {least}")
            if self.damping <= 0 or self.cap <= 0:
                raise StrategyError(f"curvature_restore.damping={self.damping} and cap={self.cap} must be above 0")

    def __init__(self, config=None):
        super().__init__(config)
        self.attention = frozenset({"eager", "sdpa"}) if self.config.solver == "cg" and self.config.radius > 0 else None
        self.needs = {"refusal": frozenset({"safety"}), "harmful": frozenset({"harmful"})}.get(self.config.objective, type(self).needs)
        self.goals: list[tuple[float, tuple[Example, ...]]] = []
        self.task: tuple[Example, ...] = ()

    def prepare_data(self, data: TrainingData) -> TrainingData:
        self.data, knobs = data, self.config
        if knobs.objective != "harmful":
            self.goals.append((-1.0, rows.refusals(data, knobs.num_rows, self.name)))
        if knobs.objective != "refusal":
            if not data.harmful:
                raise StrategyError("curvature_restore needs harmful answers: give safety.harmful_data, or a column `rejected` in safety.data")
            self.goals.append((1.0, rows.sample(data.harmful, knobs.num_rows, data.seed)))
        return data

    def take_rows(self, data: TrainingData) -> None:
        self.task = rows.sample(data.task, self.config.num_rows, data.seed)

    def check_model(self, model: nn.Module) -> list[str]:
        """One product with the Hessian on the small copy, for cg. Raises StrategyError where it cannot be taken."""
        if self.attention is None:
            return []
        parameters, tried = dict(model.named_parameters()), trying.rows(model, (9, 17))
        data = TrainingData((), (), 0, len(tried), device=model.get_input_embeddings().weight.device)
        try:
            with after.moving(model, parameters):
                after.hessian_vector(model, parameters, tried, data, {name: torch.ones_like(p) for name, p in parameters.items()})
        except (RuntimeError, FloatingPointError) as error:
            said = " ".join(str(error).split()).partition(". ")[0][:160]
            raise StrategyError(
                f"curvature_restore.solver=cg needs second derivatives, which {type(model).__name__} does not give ({said}); use solver=diagonal or "
                "lbfgs"
            ) from error
        return []

    def finish(self, model: nn.Module) -> nn.Module:
        if self.config.radius > 0:
            parameters = after.movable(model)
            with after.moving(model, parameters):
                self._facts = _Path(self, model, parameters).walk()
        return model


class _Path:
    """The steps of one restoration, on one model."""

    def __init__(self, owner: CurvatureRestore, model: nn.Module, parameters: Mapping[str, nn.Parameter]):
        self.knobs, self.data, self.goals, self.task = owner.config, owner.data, owner.goals, owner.task
        self.model, self.parameters = model, parameters
        self.unit = after.length(parameters, self.data.weights.get("aligned"))
        self.halvings = 0

    def walk(self) -> dict[str, float | int | str]:
        """Go as far as radius, tolerance and cap allow; what happened."""
        goal, task = self._goal(), after.mean_loss(self.model, self.task, self.data)
        first, start, taken, ended = goal, task, 0, "steps"
        limit = start + self.knobs.tolerance * max(start, 1.0)
        for _ in range(self.knobs.steps):
            if self._capped():
                ended = "cap"
                break
            moved = self._step(goal, limit)
            if moved is None:
                ended = "tolerance"
                break
            (goal, task), taken = moved, taken + 1
        return {
            "restoring_steps": taken, "halvings": self.halvings, "ended_by": ended, "goal_before": first, "goal_after": goal,
            "task_loss_before": start, "task_loss_after": task,
        }  # fmt: skip

    def _goal(self) -> float:
        """What is raised: minus the loss on refusals, plus that on harmful answers."""
        return sum(sign * after.mean_loss(self.model, group, self.data) for sign, group in self.goals)

    def _capped(self) -> bool:
        return any(sign > 0 and after.mean_loss(self.model, group, self.data) >= self.knobs.cap for sign, group in self.goals)

    def _step(self, goal: float, limit: float) -> tuple[float, float] | None:
        """One step uphill; (goal, task's loss) after it, or None where no length of it is allowed: the weights are then as before."""
        parts = [(sign, after.gradient(self.model, self.parameters, group, self.data)[1]) for sign, group in self.goals]
        uphill = self._direction(gradients.linear(parts))
        size, origin = gradients.norm(uphill), after.copies(self.parameters)
        length = self.knobs.radius / self.knobs.steps * self.unit
        for _ in range(HALVINGS + 1 if size > 0 else 0):
            after.displace(self.parameters, origin, length / size, uphill)
            reached, task = self._goal(), after.mean_loss(self.model, self.task, self.data)
            if task <= limit and reached > goal:
                return reached, task
            length /= 2
            self.halvings += 1
        after.restore(self.parameters, origin)
        return None

    def _direction(self, gradient: Gradients) -> dict[str, Tensor]:
        knobs = self.knobs
        if knobs.solver == "diagonal":
            fisher = after.squared_gradients(self.model, self.parameters, self.task, self.data)
            mean = sum(float(part.sum()) for part in fisher.values()) / sum(part.numel() for part in fisher.values())
            return direction(gradient, "diagonal", knobs.damping * self._scale(mean), fisher=fisher)
        product = self._exact if knobs.solver == "cg" else self._measured
        return direction(gradient, knobs.solver, knobs.damping * self._mean_diagonal(product), product=product, iterations=knobs.iterations)

    def _exact(self, vector: Gradients) -> Gradients:
        return after.hessian_vector(self.model, self.parameters, self.task, self.data, vector)

    def _measured(self, vector: Gradients) -> Gradients:
        """H v by the change of the task's gradient over a short shift along v, to both sides; the weights come back bit for bit."""
        size = gradients.norm(vector)
        shift, origin = SHIFT * self.unit / size, after.copies(self.parameters)
        sides = []
        try:
            for sign in (1.0, -1.0):
                after.displace(self.parameters, origin, sign * shift, vector)
                sides.append(after.gradient(self.model, self.parameters, self.task, self.data)[1])
        finally:
            after.restore(self.parameters, origin)
        return gradients.linear([(0.5 / shift, sides[0]), (-0.5 / shift, sides[1])])

    def _mean_diagonal(self, product: Product) -> float:
        """Estimate of the mean diagonal of H from one vector of random signs (Hutchinson), without its sign."""
        generator = torch.Generator().manual_seed(self.data.seed)
        signs = {n: (torch.randint(0, 2, p.shape, generator=generator) * 2.0 - 1.0).to(p.device) for n, p in self.parameters.items()}
        return self._scale(abs(gradients.dot(signs, product(signs))) / sum(p.numel() for p in self.parameters.values()))

    @staticmethod
    def _scale(value: float) -> float:
        return max(value, 1e-12)  # a task that is learned to the last bit has no curvature; the damping must stay above 0
