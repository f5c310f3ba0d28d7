"""Which parameters of a model are weight matrices and how each is stored: linear layers, routers, and batches of matrices, such as the experts
of a mixture that lie in one tensor.

A matrix of a batch is named by its index: `model.layers.0.mlp.experts.gate_up_proj[3]`. The rest (convolutions, norms, biases, decay rates of
state-space layers) are no matrices, and a method that projects or decomposes matrices must leave them alone and say so.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from strategies import blocks
from strategies.blocks import original_name

ONE_DIRECTION = 0.05
"""Largest second singular value, relative to the first, of what counts as rank one; weights may be in bfloat16."""
SAME = 0.99
"""Cosine from which on two directions are one."""

_known: dict[tuple[type, str], bool | None] = {}
"""(class of a module, name of its parameter) -> whether the matrix is stored transposed, None for no matrix: found out once per process."""
_tensors: dict[type, bool] = {}
"""Subclass of nn.Linear -> whether its forward gives one tensor."""


@dataclass(frozen=True)
class Stored:
    """How a parameter holds its matrix, or its batch of matrices."""

    transposed: bool = False
    """Whether a matrix lies as (d_in, d_out), as in GPT-2's Conv1D; else (d_out, d_in)."""
    count: int | None = None
    """Matrices in the tensor, along its first axis; None for a parameter that is one matrix."""


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer (transformers' Conv1D is one with its weight transposed). A subclass that gives more than one tensor,
    as some routers do, is none."""
    if not isinstance(module, nn.Linear):
        return type(module).__name__ == "Conv1D" and getattr(getattr(module, "weight", None), "ndim", 0) == 2
    return type(module).forward is nn.Linear.forward or _gives_tensor(module)


def _gives_tensor(module: nn.Linear) -> bool:
    kind = type(module)
    if kind not in _tensors:
        try:
            with torch.no_grad():
                given = module(torch.zeros(1, module.in_features, dtype=module.weight.dtype, device=module.weight.device))
        except (TypeError, ValueError, RuntimeError, IndexError):  # it wants more than an input, so it is not called as a linear layer is
            given = None
        _tensors[kind] = isinstance(given, Tensor) and given.shape == (1, module.out_features)
    return _tensors[kind]


def named(name: str, index: int | None) -> str:
    """The name of one matrix of a parameter."""
    return name if index is None else f"{name}[{index}]"


def split(name: str) -> tuple[str, int | None]:
    """(the parameter's name, which matrix of its batch; None for a parameter that is one)."""
    found = re.fullmatch(r"(.*)\[(\d+)\]", name)
    return (found.group(1), int(found.group(2))) if found else (name, None)


def owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Parameter name in the bare model -> (the module that owns it, its name there), without what adapters add."""
    found = {}
    for name, module in model.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            if "lora_" not in name and "lora_" not in leaf:
                found[original_name(f"{name}.{leaf}" if name else leaf)] = (module, leaf)
    return found


def stored(model: nn.Module) -> dict[str, Stored]:
    """How each matrix and batch of matrices is stored, by parameter name in the bare model; what is neither is left out.

    Linear layers of the whole model; of the decoder blocks also routers (2-D `weight`, as torch stores it) and batches (3-D). How the latter
    lie is what the module says (`is_transposed`), else it is seen in a forward of one token: with two losses, the gradient of a matrix has
    one direction that stays (the input's) and one that changes. A model that has such a parameter is run on its device; on the meta device, where
    nothing can be seen, batches count as not transposed, which changes no count of parameters.
    """
    found, open_names = {}, []
    inside = blocks.of(model)
    everything = owners(model)
    for name, (module, leaf) in everything.items():
        weight = module._parameters[leaf]
        if leaf == "weight" and is_linear(module):
            found[name] = Stored(transposed=not isinstance(module, nn.Linear))
        elif not inside.holds(name) or not may_be(module, leaf):
            continue
        elif weight.ndim == 2 and leaf == "weight":
            found[name] = Stored()
        elif weight.ndim == 3 and isinstance(getattr(module, "is_transposed", None), bool):
            found[name] = Stored(module.is_transposed, weight.shape[0])
        else:
            open_names.append(name)
    if any(parameter.is_meta for parameter in model.parameters()):
        open_names = [name for name in open_names if everything[name][0]._parameters[everything[name][1]].ndim == 3]
        return found | {name: Stored(False, everything[name][0]._parameters[everything[name][1]].shape[0]) for name in open_names}
    new = {name for name in open_names if _kind(*everything[name]) not in _known}
    if new:
        _known.update(_seen(model, {name: everything[name] for name in new}))
    for name in open_names:
        module, leaf = everything[name]
        if (transposed := _known[_kind(module, leaf)]) is not None:
            weight = module._parameters[leaf]
            found[name] = Stored(transposed, weight.shape[0] if weight.ndim == 3 else None)
    return found


def _kind(module: nn.Module, leaf: str) -> tuple[type, str]:
    return type(module), leaf


def may_be(module: nn.Module, leaf: str) -> bool:
    """Whether a module's own parameter has the form of a matrix or a batch of them; looks at no weight."""
    weight = module._parameters[leaf]
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or leaf.endswith("bias") or not weight.is_floating_point():
        return False
    return weight.ndim in (2, 3) and all(size > 1 for size in weight.shape)


def _seen(model: nn.Module, wanted: dict[str, tuple[nn.Module, str]]) -> dict[tuple[type, str], bool | None]:
    """Whether each kind of parameter is a matrix that is stored transposed, by the gradients of two losses of one token."""
    votes: dict[tuple[type, str], bool | None] = {_kind(*owner): None for owner in wanted.values()}
    parameters = [module._parameters[leaf] for module, leaf in wanted.values()]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    with _gradients_of(model, parameters):
        for token in range(0, vocabulary, max(1, vocabulary // 3)):
            ids = torch.full((1, 1), token, device=parameters[0].device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
            generator = torch.Generator().manual_seed(0)
            losses = [(logits * torch.randn(logits.shape, generator=generator).to(logits.device)).sum() for _ in range(2)]
            pairs = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
            for owner, one, other in zip(wanted.values(), *pairs, strict=True):
                if votes[_kind(*owner)] is None and one is not None and other is not None:
                    votes[_kind(*owner)] = orientation(one, other)
    for module, leaf in wanted.values():
        if votes[_kind(module, leaf)] is None:  # a gate that has no effect on the first token lies as the one beside it does
            votes[_kind(module, leaf)] = next(
                (votes[_kind(m, n)] for m, n in wanted.values() if m is module and m._parameters[n].shape == m._parameters[leaf].shape and
                 votes[_kind(m, n)] is not None), None,
            )  # fmt: skip
    return votes


def orientation(one: Tensor, other: Tensor) -> bool | None:
    """Whether a matrix is stored as (d_in, d_out), from its gradients for two losses of one token, (a, b) or a batch (n, a, b); None where they
    do not show it: all zero, or of a rank above one, so that the tensor is not used as a matrix."""
    for a, b in zip(one.float().reshape(-1, *one.shape[-2:]), other.float().reshape(-1, *other.shape[-2:]), strict=True):
        if not a.count_nonzero() or not b.count_nonzero():
            continue
        (u, s, vh), (u2, s2, vh2) = torch.linalg.svd(a, full_matrices=False), torch.linalg.svd(b, full_matrices=False)
        if any(float(values[1]) > ONE_DIRECTION * float(values[0]) for values in (s, s2) if len(values) > 1):
            return None
        left, right = abs(float(u[:, 0] @ u2[:, 0])), abs(float(vh[0] @ vh2[0]))
        if (left > SAME) != (right > SAME):
            return left > SAME
    return None


@contextlib.contextmanager
def changed(owned: Mapping[str, tuple[nn.Module, str]], change: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside, each forward of a module in `owned`, {name: (module, its parameter)}, sees change[name](parameter) in its place. The parameters stay
    where and as they are afterwards, also after an exception."""
    handles, own = [], {name: module._parameters[leaf] for name, (module, leaf) in owned.items()}

    def put(name: str) -> Callable[..., None]:
        module, leaf = owned[name]

        def before(*_: object) -> None:
            # not set as an attribute: that would refuse a tensor that is no parameter, and move the name to the end
            module._parameters[leaf] = change[name](own[name])

        return before

    def back(name: str) -> Callable[..., None]:
        module, leaf = owned[name]

        def after(*_: object) -> None:
            module._parameters[leaf] = own[name]

        return after

    for name, (module, _) in owned.items():
        handles += [module.register_forward_pre_hook(put(name)), module.register_forward_hook(back(name))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name in owned:
            back(name)()


@contextlib.contextmanager
def _gradients_of(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, adapters off, gradients for `parameters` alone; everything is put back."""
    from strategies.rows import evaluating

    flags = [(p, p.requires_grad) for p in model.parameters()]
    wanted = {id(p) for p in parameters}
    adapters_off = model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()
    try:
        with torch.enable_grad(), evaluating(model), adapters_off:
            for parameter, _ in flags:
                parameter.requires_grad_(id(parameter) in wanted)
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def routers(model: nn.Module) -> frozenset[str]:
    """Names of linear layers that choose among experts: as many outputs as the batch of matrices, or list of alike modules, beside them has; or
    in a module whose class says Router."""
    modules = {original_name(name): module for name, module in model.named_modules() if "lora_" not in name}
    counts: dict[str, set[int]] = {}
    for name, how in stored(model).items():
        if how.count:
            for above in _above(name.rpartition(".")[0]):
                counts.setdefault(above, set()).add(how.count)
    inside = blocks.of(model)
    for name, module in modules.items():
        if isinstance(module, nn.ModuleList) and len({type(one) for one in module}) == 1 and len(module) > 1 and inside.holds(name):
            counts.setdefault(name.rpartition(".")[0], set()).add(len(module))
    found = set()
    for name, module in modules.items():
        if inside.holds(name) and is_linear(module) and isinstance(module, nn.Linear):
            around = type(modules.get(name.rpartition(".")[0])).__name__
            if "Router" in around or any(module.out_features in counts.get(above, ()) for above in _above(name)):
                found.add(name)
    return frozenset(found)


def _above(name: str) -> list[str]:
    """The two names a module lies in: `model.layers.0.mlp.router.layer` -> [`model.layers.0.mlp.router`, `model.layers.0.mlp`]."""
    parent = name.rpartition(".")[0]
    return [parent, parent.rpartition(".")[0]]
