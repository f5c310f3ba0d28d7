"""Adapters merged into the weights they belong to: untied where that is needed, and held against the unmerged model's logits.

A head that shares its weights with the embedding (`tie_word_embeddings`) and an adapter on one of them do not go together: merged as they are,
the other one changes too. Here both get weights of their own first, and the config says so. Then a few rows are asked before and after; a
difference beyond round-off is an error, never a model.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from strategies.base import StrategyError
from strategies.rows import evaluating

ROWS, WIDTH = 3, 16
"""Rows asked before and after a merge, and tokens of each."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Largest difference of a logit that counts as round-off, relative to the largest logit, by the type of the weights."""
REDUCED = 1e-2
"""The same for float32 weights multiplied in a reduced precision (TF32)."""


@dataclass(frozen=True)
class Merge:
    """What a merge did."""

    difference: float
    """Largest difference of a logit before and after."""
    largest: float
    """Largest logit before."""
    untied: bool


def wrapped(model: nn.Module) -> bool:
    """Whether the model carries adapters of peft."""
    return hasattr(model, "merge_and_unload")


def merged(model: nn.Module, what: str = "the adapter") -> nn.Module:
    """A plain model that answers as `model` does, its adapters added to its weights; a model without adapters is returned as it is.

    Changes `model` in place. Raises StrategyError where adapters of this kind cannot be merged (prompts in front, a quantised base), and
    where the merged model's logits differ by more than round-off.
    """
    return measured(model, what)[0]


def measured(model: nn.Module, what: str = "the adapter") -> tuple[nn.Module, Merge | None]:
    """`merged`, and what was seen on the way; None for a model without adapters."""
    if not wrapped(model):
        return model, None
    refuse(model, what)
    training = model.training
    with evaluating(model):
        ids = _ids(model)
        before = logits(model, ids)
        split = _adapted_ends(model) and untie(model.get_base_model())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of tied weights, which were taken care of
            plain = model.merge_and_unload()
        seen = same(before, logits(plain.eval(), ids), dtype_of(plain), f"{what}: merging it into its base")
    return plain.train(training), Merge(*seen, split)


def refuse(model: nn.Module, what: str = "the adapter") -> None:
    """Raises StrategyError for adapters that have no counterpart in the base's weights."""
    for name, settings in getattr(model, "peft_config", {}).items():
        if getattr(settings, "is_prompt_learning", False) or str(getattr(settings.peft_type, "value", settings.peft_type)) == "ADAPTION_PROMPT":
            raise StrategyError(f"{what} ({name}) is of the kind {settings.peft_type.value}, prompts in front of the text, which no weight can hold")
    base = model.get_base_model()
    if getattr(base, "is_quantized", False) or getattr(base, "quantization_method", None):
        raise StrategyError(f"{what} sits on quantised weights, which merging would round anew; give the base in its full precision")


def same(before: Tensor, after: Tensor, dtype: torch.dtype, what: str) -> tuple[float, float]:
    """(largest difference, largest logit before). Raises StrategyError where they differ by more than round-off, or are not finite."""
    largest = float(before.abs().max())
    difference = float((before - after).abs().max())
    allowed = TOLERANCE.get(dtype, 1e-4)
    if before.is_cuda and dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        allowed = REDUCED
    if not difference <= allowed * max(largest, 1e-6):
        raise StrategyError(
            f"{what} changed what the model says: logits differ by up to {difference:.3g} (largest logit {largest:.3g}, round-off allows "
            f"{allowed:g} of it in {str(dtype).removeprefix('torch.')}), so the result was not kept; merge it with the "
            "tool that made it"
        )
    return difference, largest


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """(rows, tokens, vocabulary), float32."""
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()


def dtype_of(model: nn.Module) -> torch.dtype:
    """The least exact floating type among the weights."""
    return min((p.dtype for p in model.parameters() if p.is_floating_point()), key=lambda d: -torch.finfo(d).eps)


def _ids(model: nn.Module) -> Tensor:
    """The same rows every time, drawn from the whole vocabulary; its last entries, where added tokens lie, are among them."""
    weight = _weight(model.get_input_embeddings())
    rows = torch.randint(weight.shape[0], (ROWS, WIDTH), generator=torch.Generator().manual_seed(0))
    last = min(4, weight.shape[0])
    rows[0, -last:] = torch.arange(weight.shape[0] - last, weight.shape[0])
    return rows.to(weight.device)


# ------------------------------------------------------------------------------------------------ embedding and head


def untie(model: nn.Module) -> bool:
    """Give the head weights of its own where it shares the embedding's, and say so in the config; whether anything was done."""
    head = _inner(model.get_output_embeddings())
    if head is None or _weight(head) is not _weight(model.get_input_embeddings()):
        return False
    shared = head.weight
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    for settings in {id(s): s for s in (model.config, model.config.get_text_config())}.values():
        settings.tie_word_embeddings = False
    return True


def tied(model: nn.Module) -> bool:
    """Whether head and embedding share their weights."""
    head = model.get_output_embeddings()
    return head is not None and _weight(head) is _weight(model.get_input_embeddings())


def _adapted_ends(model: nn.Module) -> bool:
    """Whether an adapter sits on the head or the embedding."""
    base = model.get_base_model()
    return any(end is not None and _inner(end) is not end for end in (base.get_input_embeddings(), base.get_output_embeddings()))


def _inner(module: nn.Module | None) -> nn.Module | None:
    """The module that an adapter's wrappers stand around."""
    while module is not None:
        below = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if below is None:
            return module
        module = below
    return None


def _weight(module: nn.Module) -> Tensor:
    return _inner(module).weight
