"""PlainEngine: the specification of an engine. Torch alone, every parameter whole on every worker, gradients summed by `all_reduce`.

The order of one optimiser step is fixed here for every engine: gradients are accumulated over micro-batches and summed over workers,
divided by the number of loss units of the step, then (strategy) surgery, then the finiteness check, clipping, AdamW at the scheduled
rate. `DeepSpeedEngine` (orchestrator/trial/engine) replaces only where shards live (`_backward`, `_collect`, `_apply`, `_weights`, `_publish`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies import checkpoint, gradients, trying
from strategies.base import Batch, Loss, lm_loss
from strategies.optim import Settings, lr_at, master_weights, parameter_groups


class ShardedGradient:
    """A gradient as this worker holds it: a list of tensors, and how a worker's sums become the sums over all workers."""

    def __init__(self, parts: Sequence[Tensor], total):
        self.parts = tuple(parts)
        self._total = total

    def dot(self, other: ShardedGradient) -> float:
        """Inner product over all trainable parameters of all workers, summed in float64; the same number on every worker."""
        return self._total(gradients.tensors_dot(self.parts, other.parts))[0]

    def gram(self, other: ShardedGradient) -> tuple[float, float, float]:
        """(<self, self>, <self, other>, <other, other>), each as `dot` gives it; the gradients are read once and workers asked once."""
        return tuple(self._total(*gradients.tensors_gram(self.parts, other.parts)))

    def norm(self) -> float:
        """Euclidean norm over all trainable parameters of all workers."""
        return math.sqrt(self.dot(self))

    def like(self, parts: Sequence[Tensor]) -> ShardedGradient:
        """The vector of saved `parts` of a vector sharded as this one, on its device. Raises ValueError where shapes differ."""
        shapes, wanted = [tuple(part.shape) for part in parts], [tuple(part.shape) for part in self.parts]
        if shapes != wanted:
            raise ValueError(f"saved parts of shapes {shapes[:3]} ... do not fit this engine's {wanted[:3]} ...; resume with the same settings")
        return ShardedGradient([part.to(mine.device) for part, mine in zip(parts, self.parts, strict=True)], self._total)


class PlainEngine:
    """Trains `model` (whole, on `device`) with AdamW. With `world_size` > 1 the default process group must be initialised.

    Settings are those of `training` (see `Settings`). `bf16` computes under autocast; weights, gradients and moments of what is
    trained stay in float32. Raises ValueError where nothing is trainable.
    """

    sharded = False
    """Whether `_weights` of the workers are disjoint parts (True) or copies of each other (False)."""
    _share = 1
    """`_collect` gives the sum over workers divided by this."""

    def __init__(self, model: nn.Module, *, training: Any = None, max_steps: int, rank: int = 0, world_size: int = 1, device: Any = "cpu"):
        self.training = training if training is not None else Settings()
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.max_steps, self.steps = max_steps, 0
        self.rate_factor = 1.0
        self.load_trouble: str | None = None
        """What the last `load` found damaged and took instead, in a sentence."""
        """What `scale_rate` set; 1 leaves the schedule as it is."""
        self.module: nn.Module = model
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trainable:
            raise ValueError("every parameter is frozen, so nothing can be trained; narrow freeze_layers or add lora")
        self._dtypes = master_weights(self.trainable, bf16=self.training.bf16)
        self._held: list[Tensor] | None = None
        self._exported: nn.Module | None = None
        self._options = trying.options(model)
        self._build()

    # ---- what an engine with shards replaces ---------------------------------------------------------------------------------

    def _build(self) -> None:
        if self.world_size > 1:
            for parameter in self.module.parameters():
                dist.broadcast(parameter.data, src=0)
        # one call over all parameters either way; the fused one reads each of them once, and its state differs on GPUs only
        kind = {"fused": True} if self.device.type == "cpu" else {"foreach": True}
        self._optimizer = torch.optim.AdamW(parameter_groups(self.trainable, self.training.weight_decay), **kind)

    def _forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def _backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def _collect(self) -> list[Tensor]:
        """Take out what `_backward` accumulated, summed over workers; this worker's part of it."""
        parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.trainable.values()]
        for parameter in self.trainable.values():
            parameter.grad = None
        if self.world_size > 1:
            for part in parts:
                dist.all_reduce(part)
        return parts

    def _apply(self, parts: list[Tensor]) -> None:
        """One optimiser step along `parts`; nothing of them is left in the model."""
        for parameter, part in zip(self.trainable.values(), parts, strict=True):
            parameter.grad = part
        self._optimizer.step()
        for parameter in self.trainable.values():
            parameter.grad = None

    def _weights(self) -> list[Tensor]:
        """This worker's part of the float32 weights, in the order of the gradient's parts."""
        return [p.data for p in self.trainable.values()]

    def _publish(self) -> None:
        """Make a change of `_weights` visible to the model."""

    def _moments(self) -> list[Tensor]:
        """The tensors under which the optimiser keeps its state, in the order of `_weights`."""
        return list(self.trainable.values())

    def _release(self) -> nn.Module:
        """The whole trained module, free of the engine."""
        return self.module

    # ---- the verbs ------------------------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The module: as trained here, or as exported. Under ZeRO-3 its parameters are whole only inside `gathered()`."""
        return self._exported if self._exported is not None else self.module

    def gradient(self, batches: Sequence[Batch], loss: Loss = lm_loss) -> float:
        """Add the gradient of the mean loss over `batches` of all workers; returns that mean.

        The mean is taken over loss units, so 1 and 2 workers, or 1 and 4 micro-batches of the same rows, agree. Raises
        FloatingPointError where the loss is NaN or infinite, ValueError without batches or without a single unit (say, no label).
        """
        self._alive()
        if not batches:
            raise ValueError("gradient of no micro-batches; every worker needs at least one (TrainingData.batches gives it)")
        if not self.module.training:
            self.module.train()
        total = units = 0.0
        for i, batch in enumerate(batches):
            with self.autocast():
                value, count = loss(self._call, batch)
            self._backward(value, i == len(batches) - 1)
            total, units = total + float(value.detach()), units + float(count)
        parts = self._collect()
        total, units = self._sums(total, units)
        if not math.isfinite(total):
            raise FloatingPointError(self._blame("the loss", total))
        if units == 0:
            raise ValueError("no loss unit in this step (no labelled token); check task.data and task.max_length")
        torch._foreach_mul_(parts, self._share / units)
        self._held = parts if self._held is None else [held.add_(part) for held, part in zip(self._held, parts, strict=True)]
        return total / units

    def gradients(self) -> ShardedGradient:
        """Take the accumulated gradient out: the engine's own is zero afterwards."""
        held, self._held = self._held, None
        return ShardedGradient(held if held is not None else self._zeros(), self._total)

    def combine(self, terms: Sequence[tuple[float, ShardedGradient]]) -> None:
        """Set the accumulated gradient to the sum of coefficient * gradient; a coefficient of 0 leaves its term out."""
        if not terms:
            self._held = None
            return
        self._held = gradients.linear_tensors([(c, gradient.parts) for c, gradient in terms])

    def shifted(self, direction: ShardedGradient, scale: float) -> AbstractContextManager[None]:
        """Weights plus scale * direction inside the block; restored bit for bit afterwards, also after an exception."""
        return self._shifted(direction, scale)

    @contextmanager
    def _shifted(self, direction: ShardedGradient, scale: float) -> Iterator[None]:
        self._alive()
        saved = [w.clone() for w in self._weights()]
        try:
            for weight, part in zip(self._weights(), direction.parts, strict=True):
                weight.add_(part, alpha=scale)
            self._publish()
            yield
        finally:
            for weight, copy in zip(self._weights(), saved, strict=True):
                weight.copy_(copy)
            self._publish()

    def zero(self) -> None:
        """Forget the accumulated gradient."""
        self._held = None

    def weights(self) -> ShardedGradient:
        """A copy of the trainable weights (float32), shaped and sharded like a gradient."""
        self._alive()
        return ShardedGradient([w.detach().clone() for w in self._weights()], self._total)

    def linear(self, terms: Sequence[tuple[float, ShardedGradient]]) -> ShardedGradient:
        """The sum of coefficient * vector, a new vector; the accumulated gradient is not touched. Raises ValueError without terms."""
        return ShardedGradient(gradients.linear_tensors([(c, vector.parts) for c, vector in terms]), self._total)

    def move(self, terms: Sequence[tuple[float, ShardedGradient]]) -> None:
        """Add the sum of coefficient * vector to the weights, for good. Terms with coefficient 0 change no bit."""
        self._alive()
        used = [(c, vector) for c, vector in terms if c != 0]
        for c, vector in used:
            for weight, part in zip(self._weights(), vector.parts, strict=True):
                weight.add_(part, alpha=c)
        if used:
            self._publish()

    def sensitivity(self, leaves: Sequence[Tensor], batches: Sequence[Batch], loss: Loss = lm_loss) -> list[Tensor]:
        """Gradient of the mean loss over all workers with respect to `leaves`, one tensor each; parameters get none.

        Raises ValueError without a single unit, FloatingPointError for a loss that is not finite.
        """
        self._alive()
        sums, total, units = [torch.zeros_like(leaf) for leaf in leaves], 0.0, 0.0
        for batch in batches:
            with self.autocast():
                value, count = loss(self._aside, batch)
            for held, part in zip(sums, torch.autograd.grad(value, list(leaves), allow_unused=True), strict=True):
                if part is not None:
                    held.add_(part)
            total, units = total + float(value.detach()), units + float(count)
        total, units = self._sums(total, units)
        if not math.isfinite(total):
            raise FloatingPointError(self._blame("the loss", total))
        if units == 0:
            raise ValueError("no loss unit in this step (no labelled token); check task.data and task.max_length")
        for held in sums:
            if self.world_size > 1:
                dist.all_reduce(held)
            held.div_(units)
        return sums

    def step(self) -> dict[str, float]:
        """Clip and apply the accumulated gradient at the scheduled rate; returns `learning_rate` and `grad_norm` (before clipping).

        Raises FloatingPointError, with the weights untouched, where the gradient holds NaN or infinity.
        """
        self._alive()
        settings, parts = self.training, self._held if self._held is not None else self._zeros()
        norm = ShardedGradient(parts, self._total).norm()
        if not math.isfinite(norm):
            raise FloatingPointError(self._blame("the gradient's norm", norm))
        if settings.max_grad_norm > 0 and norm > settings.max_grad_norm:
            torch._foreach_mul_(parts, settings.max_grad_norm / (norm + 1e-6))
        rate = lr_at(
            self.steps, max_steps=self.max_steps, learning_rate=settings.learning_rate,
            kind=settings.lr_scheduler_type, warmup_ratio=settings.warmup_ratio,
        ) * self.rate_factor  # fmt: skip
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._held = None
        self._apply(parts)
        self.steps += 1
        return {"learning_rate": rate, "grad_norm": norm}

    def scale_rate(self, factor: float) -> None:
        """From the next step on the scheduled rate times `factor` (in place of an earlier factor). Saved and loaded with the rest.

        Raises ValueError for a factor that is not above 0.
        """
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"the learning rate cannot be scaled by {factor}; give a number above 0")
        self.rate_factor = factor

    def save(self, folder: str | Path, extra: dict[str, Any] | None = None) -> None:
        """Write all this worker needs to continue bit for bit, with `extra` (plain values and tensors). Collective.

        Files load with `torch.load(weights_only=True)`; `folder/latest` is written last, so a killed save leaves the one before it.
        Only between steps: raises ValueError while a gradient is held.
        """
        self._alive()
        if self._held is not None:
            raise ValueError("save in the middle of a step; call it between step() and the next gradient()")
        state = {
            "weights": [w.clone() for w in self._weights()],
            "moments": [dict(self._optimizer.state.get(key, {})) for key in self._moments()],
            "random": checkpoint.random_state(self.device),
            "rate_factor": self.rate_factor,
            "extra": extra or {},
        }
        checkpoint.write(folder, state, step=self.steps, rank=self.rank, world_size=self.world_size, signature=self._signature())

    def load(self, folder: str | Path) -> dict[str, Any] | None:
        """Continue from `folder`; returns what `save` was given as `extra`, or None where no checkpoint is whole. Collective.

        Where one is damaged the one before is taken, and `load_trouble` says so. Raises checkpoint.CheckpointError for
        another number of workers, another engine or other trainable parameters.
        """
        self._alive()
        found = checkpoint.read(folder, rank=self.rank, world_size=self.world_size, signature=self._signature())
        self.load_trouble = found.trouble
        if found.step is None:
            return None
        self.steps, state = found.step, found.state
        self.rate_factor = state.get("rate_factor", 1.0)
        for weight, saved in zip(self._weights(), state["weights"], strict=True):
            weight.copy_(saved.to(weight.device))
        self._publish()
        for key, saved in zip(self._moments(), state["moments"], strict=True):
            # Adam keeps its step counter on the CPU, everything else beside the weight
            self._optimizer.state[key] = {k: v if k == "step" else v.to(key.device) for k, v in saved.items()}
        checkpoint.set_random_state(state["random"])
        self._held = None
        return state["extra"]

    def gathered(self) -> AbstractContextManager[nn.Module]:
        """The whole module for reading (evaluation) in the middle of training; its training mode is put back. Collective."""
        return self._gathered()

    @contextmanager
    def _gathered(self) -> Iterator[nn.Module]:
        self._alive()
        mode = self.module.training
        with self.autocast():
            yield self.module
        self.module.train(mode)

    def export(self) -> nn.Module:
        """End training: the whole trained module on every worker, free of the engine. Afterwards only `model` and `close` are left."""
        if self._exported is None:
            module = self._release()
            for name, parameter in module.named_parameters():
                parameter.grad = None
                if name in self._dtypes:
                    parameter.data = parameter.data.to(self._dtypes[name])
            self.close()
            self._exported = module
        return self._exported

    def close(self) -> None:
        """Drop optimiser state and gradients. May be called twice."""
        self._held = self._optimizer = None

    # ---- inside ---------------------------------------------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 compute where `training.bf16` asks for it."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.training.bf16 else contextlib.nullcontext()

    def _call(self, **inputs: Any) -> Any:
        return self._forward(**self._options, **inputs)

    def _aside(self, **inputs: Any) -> Any:
        """A forward whose backward reaches no parameter."""
        return self._call(**inputs)

    def _alive(self) -> None:
        if self._optimizer is None:
            raise RuntimeError("the engine is closed or its model exported; build a new one to train on")

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros_like(w) for w in self._weights()]

    def _total(self, *values: float) -> list[float]:
        """Sums over workers' shards; where workers hold copies, their means, so that all go on with the very same numbers."""
        return [value / (1 if self.sharded else self.world_size) for value in self._sums(*values)]

    def _sums(self, *values: float) -> list[float]:
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def _blame(self, what: str, value: float) -> str:
        rate = self.training.learning_rate
        return (
            f"{what} became {value} at optimiser step {self.steps + 1}; lower training.learning_rate (now {rate:g})"
            " or set training.max_grad_norm"
        )

    def _signature(self) -> dict[str, Any]:
        shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in self.trainable.items()}
        return {"engine": type(self).__name__, "parameters": checkpoint.digest(shapes)}
