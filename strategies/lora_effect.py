"""Whether an adapter has an effect: what a model's own code reads past its layers, and what peft loads again of what it saved."""

from __future__ import annotations

import contextlib
import copy
import tempfile
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from strategies import blocks, matrices, trying
from strategies.base import StrategyError

if TYPE_CHECKING:
    from peft import LoraConfig

NO_EFFECT = 2e-2
"""Change of a logit, relative to the largest, below which it counts as unchanged; kernels of GPUs add up in any order, in bfloat16."""

LOST = 1e-3
"""The same, above which a saved adapter is another one when it is loaded; both sides are computed alike."""


def without_weights(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def bypassed(model: nn.Module, modules: tuple[str, ...]) -> frozenset[str]:
    """Linear layers that are not called where the module around them is: kernels of state-space layers are given the weight alone."""
    watched = {name: model.get_submodule(name) for name in modules}
    parents = {name: model.get_submodule(name.rpartition(".")[0]) for name in modules}
    called: set[int] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: called.add(id(module)))
        for module in {id(m): m for m in [*watched.values(), *parents.values()]}.values()
    ]
    try:
        _asked_once(model)
    finally:
        for hook in hooks:
            hook.remove()
    return frozenset(name for name in modules if id(parents[name]) in called and id(watched[name]) not in called)


def read_elsewhere(model: nn.Module, parameters: tuple[str, ...]) -> frozenset[str]:
    """Parameters that peft cannot change: those without effect from within their module's forward, since another module reads them (DBRX), and those
    whose module does not work inside a wrapper, since another one keeps its state there (RecurrentGemma)."""
    owners = matrices.owners(model)
    kinds: dict[tuple[type, str], list[str]] = {}
    for name in parameters:
        module, leaf = owners[name]
        kinds.setdefault((type(module), leaf), []).append(name)
    found: list[str] = []
    before = _asked_twice(model) if parameters else None
    for names in kinds.values():
        owned = {name: owners[name] for name in names}
        try:
            with _inside_wrappers(model, [name.rpartition(".")[0] for name in names]) as wrappers:
                inside = _asked_twice(model)
        except (AttributeError, TypeError):  # somebody looks for what the module has, or calls it by names that peft's wrapper does not know
            found += names
            continue
        with matrices.changed(owned, dict.fromkeys(names, _turned)):
            other = _asked_twice(model)
        least = NO_EFFECT * float(before.abs().max())
        kept = any(set(vars(wrapper)) != set(vars(_Wrapper(nn.Identity()))) for wrapper in wrappers)  # a state was put into the wrapper
        if kept or float((inside - before).abs().max()) > least or float((other - before).abs().max()) <= least:
            found += names
    return frozenset(found)


class _Wrapper(nn.Module):
    """Stands where a module stood and calls it, as peft's wrappers of parameters do."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.base_layer = inner

    def forward(self, x: Any, *inputs: Any, **options: Any) -> Any:  # peft's signature: the first input has no name of the module's own
        return self.base_layer(x, *inputs, **options)


@contextlib.contextmanager
def _inside_wrappers(model: nn.Module, names: list[str]) -> Iterator[list[nn.Module]]:
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    own = [getattr(parent, child) for parent, child in places]
    try:
        for (parent, child), module in zip(places, own, strict=True):
            setattr(parent, child, _Wrapper(module))
        yield [getattr(parent, child) for parent, child in places]
    finally:
        for (parent, child), module in zip(places, own, strict=True):
            setattr(parent, child, module)


def _asked_twice(model: nn.Module) -> Tensor:
    """Logits of some tokens after others were asked, so that a state that stays behind shows."""
    _asked_once(model)
    return _asked_once(model, 1)


def _turned(weight: Tensor) -> Tensor:
    """Another matrix; a larger one would make no difference before a norm."""
    return weight.flip(-1)


def _asked_once(model: nn.Module, first: int = 0) -> Tensor:
    """Logits of a few tokens, as in training: with a cache, other kernels are taken."""
    with torch.no_grad(), _training(model):
        vocabulary = model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(first, vocabulary, max(1, vocabulary // 8), device=next(model.parameters()).device)[None, :8]
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **trying.options(model)).logits.float()


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode, which decides on some kernels, without drawing from the caller's generator."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)  # the same dropout each time
            model.train()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_reload(model: nn.Module, adapters: LoraConfig) -> None:
    """Raises StrategyError where such adapters on this model, saved by peft and loaded by peft, give other logits: peft gives weights
    other names when it loads some families' adapters. Copies of the model are made, so it must be a small one, with weights."""
    if without_weights(model):
        return
    from peft import PeftModel, get_peft_model

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        made = get_peft_model(copy.deepcopy(model), adapters)
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        made.save_pretrained(folder)
        wanted = _asked_plainly(made)
        try:
            loaded = _asked_plainly(PeftModel.from_pretrained(copy.deepcopy(model), folder))
        except Exception as error:  # whatever peft raises: nobody could load what was trained
            raise StrategyError(
                f"lora: an adapter of this model that peft saved cannot be loaded by it again ({' '.join(str(error).split())[:200]}); {_OTHERWISE}"
            ) from error
    apart = float((loaded - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9))
    if not apart <= LOST:
        raise StrategyError(
            f"lora: an adapter of this model answers otherwise once peft has saved and loaded it (a logit differs by {apart:.2g} of the largest), "
            f"since peft gives its weights other names; {_OTHERWISE}"
        )

_OTHERWISE = "name other target_modules, such as q_proj,v_proj, or train this model with full"


def _asked_plainly(model: nn.Module) -> Tensor:
    """Logits of a few tokens in evaluation mode."""
    inner, was = blocks.bare(model), model.training
    ids = torch.arange(0, vocabulary := inner.get_input_embeddings().weight.shape[0], max(1, vocabulary // 8))[None, :8]
    with torch.no_grad():
        found = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **trying.options(model)).logits.float()
    model.train(was)
    return found
