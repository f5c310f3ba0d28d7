"""What transformers says it loaded: a tensor that was missing would start at random, another at each load, and nothing would show it.

The same is asked before a device is taken: on the meta device transformers reads the headers of the files and converts their names, and no weight.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import config
from orchestrator.errors import ModelError
from orchestrator.models import folders

if TYPE_CHECKING:
    from torch import nn

HARMLESS = re.compile(r"(rotary_emb|rope)\.inv_freq$|\.masked_bias$|\.attn(ention)?\.bias$|position_ids$|_extra_state$")
"""What older versions of libraries wrote beside the weights: computed from the config, or masks. Nothing of the model is lost without them."""


FLOATS = ("F64", "F32", "F16", "BF16")


def refuse(model: config.Model, loaded: nn.Module, told: Mapping[str, Any]) -> None:
    """Raises ModelError where `told` (transformers' loading report of `loaded`) shows an adapter, tensors that are missing, of another shape,
    or left over, each by name. Tied weights that lie in the files twice or once are no difference, nor is what the class itself ignores."""
    name, kind = model.model_name_or_path, type(loaded).__name__
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise ModelError(f"{name!r} is an adapter, not a whole model; download it and give its folder (safebasin evaluate FOLDER), or give its base")
    more = [key for key in sorted(told.get("unexpected_keys") or ()) if not _harmless(key, loaded)]
    missing = sorted(told.get("missing_keys") or ())
    heads = _named(more)
    if missing and more:
        raise ModelError(
            f"the weights of {name!r} are not those of a causal language model ({kind}): they lack {_named(missing)} and hold {heads} instead; give "
            "the model that it was made from, or one saved with its language head"
        )
    if missing:
        raise ModelError(
            f"the weights of {name!r} lack {_count(missing)} of the model ({kind}), which would start at random: {_named(missing)}; its files "
            "are incomplete, or were saved without the language head: copy them anew"
        )
    other = sorted(told.get("mismatched_keys") or ())
    if other:
        key, found, wanted = other[0]
        raise ModelError(
            f"config.json and the weights of {name!r} do not belong together: {key} is {tuple(found)} in its files and {tuple(wanted)} in the model"
            f"{f', and {len(other) - 1} more differ' if len(other) > 1 else ''}; copy both anew"
        )
    deeper = _beyond(loaded, more)
    if deeper:
        count = loaded.config.get_text_config().num_hidden_layers
        raise ModelError(
            f"config.json of {name!r} says num_hidden_layers={count}, but its weights hold {deeper}; config and weights are of two models"
        )
    if more:
        raise ModelError(
            f"the weights of {name!r} hold {_count(more)} that {kind} has no place for, and that would be lost: {heads}; they are of another "
            "model or of a head that this tool does not train: take them out of the files, or give the model that they belong to"
        )


def check_finite(model: config.Model, loaded: nn.Module) -> None:
    """Raises ModelError for weights that are NaN or infinite, by name; later it would look as if training had diverged."""
    import torch

    for name, weight in loaded.named_parameters():
        if weight.is_floating_point() and not torch.isfinite(weight.detach().sum(dtype=torch.float32)) and not torch.isfinite(weight).all():
            raise ModelError(f"the weights of {model.model_name_or_path!r} are NaN or infinite in {name}: its files are broken; copy them anew")


def _check_types(model: config.Model, held: Mapping[str, folders.Tensor]) -> None:
    """Raises ModelError for matrices that are no floating-point numbers of 16 bits or more: without the scales of what quantised them, their values
    are others."""
    odd = sorted(name for name, one in held.items() if len(one.shape) > 1 and one.dtype not in FLOATS and not HARMLESS.search(name))
    odd = [name for name in odd if held[name].dtype != "BOOL"]  # masks
    if odd:
        raise ModelError(
            f"the weights of {model.model_name_or_path!r} hold {_count(odd)} of the type {held[odd[0]].dtype} ({_named(odd)}), quantised or packed, "
            "and config.json does not say how; give the model in full precision (F32, BF16 or F16)"
        )


def _lost_experts(held: Iterable[str]) -> list[str]:
    """Names that numbered experts of one layer lack although their neighbours have them; transformers, which puts them all into one tensor, does not
    say which. Experts of a name under `.experts.` count, of the same layer only: layers may be of several kinds."""
    layers: dict[str, dict[str, set[str]]] = {}
    for name in held:
        layer, mark, rest = name.partition(".experts.")
        number, _, part = rest.partition(".")
        if mark and number.isdecimal():
            layers.setdefault(layer, {}).setdefault(number, set()).add(part)
    lost = []
    for layer, experts in layers.items():
        parts = set().union(*experts.values())
        numbers = {str(i) for i in range(max(map(int, experts)) + 1)}
        lost += [f"{layer}.experts.{number}.{part}" for number in sorted(numbers, key=int) for part in sorted(parts - experts.get(number, set()))]
    return lost


def _count(keys: list[str]) -> str:
    return f"{len(keys)} tensor{'s' * (len(keys) > 1)}"


def _named(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _harmless(key: str, loaded: nn.Module) -> bool:
    """A key the model computes itself, or has under another name because the weights are tied."""
    if HARMLESS.search(key) or key in dict(loaded.named_buffers()):
        return True
    return key in (getattr(loaded, "all_tied_weights_keys", None) or ())


def _beyond(loaded: nn.Module, keys: list[str]) -> str | None:
    """The first key of a layer that the config does not count."""
    count = getattr(loaded.config.get_text_config(), "num_hidden_layers", None)
    numbers = ((key, re.search(r"\.(\d+)\.", f".{key}")) for key in keys)
    return next((key for key, found in numbers if found and isinstance(count, int) and int(found.group(1)) >= count), None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' table of missing keys and its bars: what they say is said here in a sentence."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def look(model: config.Model, source: str) -> None:
    """`refuse` for the model in the folder `source`, from the headers of its files. Raises ModelError; whatever transformers raises is passed on."""
    from transformers import AutoModelForCausalLM

    held = folders.tensors(Path(source))
    _check_types(model, held)
    try:
        with quiet():
            loaded, told = AutoModelForCausalLM.from_pretrained(
                source,
                use_safetensors=True,
                trust_remote_code=model.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                device_map="meta",
            )
    except Exception as error:
        lost = _lost_experts(held)
        if not lost:
            raise
        raise ModelError(
            f"the weights of {model.model_name_or_path!r} lack {_count(lost)} of an expert: {_named(lost)}; copy its files anew"
        ) from error
    refuse(model, loaded, told)
