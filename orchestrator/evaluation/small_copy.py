"""A small random model of the same architecture, from a config alone: fewer layers, but every kind of layer; few tokens; narrow windows."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from orchestrator.evaluation import decoding

if TYPE_CHECKING:
    from torch import nn

MOST_WEIGHTS = 500_000_000
FULL_DEPTH_WEIGHTS = 20_000_000
"""Models up to this size keep all their layers."""
VOCABULARY = 512
WINDOW = 8
WIDTH = 256
"""Inner widths of feed-forward parts and experts: nothing of how a model keeps its past depends on them."""
POSITIONS = 64
RHYTHM = ("period", "interval", "offset", "every", "first_k", "num_dense_layers", "shared_layers", "mem_blocks")
"""Parts of names of settings that count layers after which a pattern repeats, or first layers of another kind."""


def of(config: Any, cls: type | None = None) -> nn.Module | None:
    """The copy, in float32 on the CPU in evaluation mode, its weights large enough for every part to matter; None where none can be made.

    cls: the model's class; without it the one transformers takes for a causal language model. The random state is not touched.
    """
    import torch
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        for made in _attempts(config):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = _built(made, cls)
            if model is not None:
                return model
    finally:
        logging.set_verbosity(level)
    return None


def _attempts(config: Any):
    """Configs to try, best first: with few layers where the model is large, else as deep as it is."""
    deep = _shallow(config, None)
    if deep is not None and _weights(deep) <= FULL_DEPTH_WEIGHTS:
        yield deep
        return
    cut = _shallow(config, _least_depth(config.get_text_config()))
    if cut is not None and _weights(cut) <= MOST_WEIGHTS:
        yield cut
    if deep is not None and _weights(deep) <= MOST_WEIGHTS:
        yield deep


def _shallow(config: Any, depth: int | None) -> Any | None:
    """A copy with `depth` layers (None: all), few tokens and narrow windows; None where the config class refuses."""
    from strategies import trying

    try:
        made = copy.deepcopy(config)
        text = made.get_text_config()
        for part in (made, *trying.parts(made)):
            _few_tokens(part)
            part.torch_dtype = None
        for key in decoding.window_keys(text):
            setattr(text, key, min(getattr(text, key), WINDOW))
        _slim(text)
        if depth is not None:
            _cut(text, depth)
            for part in trying.parts(made):
                if part is not text and isinstance(getattr(part, "num_hidden_layers", None), int):
                    _cut(part, 1)
    except Exception:  # config classes check their values by whatever they raise; no copy can be made then
        return None
    return made


def _few_tokens(part: Any) -> None:
    count = getattr(part, "vocab_size", None)
    if not isinstance(count, int):
        return
    few = min(count, VOCABULARY)
    for key, value in part.to_dict().items():
        if key.startswith("vocab_size") and isinstance(value, int):
            setattr(part, key, min(value, VOCABULARY))
        elif key.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= few:
            setattr(part, key, 1)


def _slim(text: Any) -> None:
    """Narrow feed-forward parts, and room for the rows that are asked."""
    for key, value in text.to_dict().items():
        inner = "intermediate_size" in key or key in ("ffn_dim", "ffn_hidden_size", "n_inner")
        if inner and isinstance(value, int) and value > WIDTH:
            setattr(text, key, WIDTH)
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < POSITIONS:
        text.max_position_embeddings = POSITIONS


def _least_depth(text: Any) -> int:
    """Layers so that every kind of layer is among them."""
    total, held = text.num_hidden_layers, text.to_dict()
    least = 2
    for key, value in held.items():
        if isinstance(value, list) and len(value) == total:
            kinds = {str(one) for one in value}
            least = max(least, next(n for n in range(1, total + 1) if {str(one) for one in value[:n]} == kinds))
        elif isinstance(value, list) and value and all(isinstance(one, int) and 0 <= one < total for one in value) and "layer" in key:
            least = max(least, min(value) + 1)
        elif isinstance(value, int) and not isinstance(value, bool) and any(word in key for word in RHYTHM):
            least = max(least, value + 1)
    return min(least, total)


def _cut(part: Any, depth: int) -> None:
    total = part.num_hidden_layers
    for key, value in part.to_dict().items():
        if isinstance(value, list) and len(value) == total and total > 1:
            setattr(part, key, value[:depth])
        elif isinstance(value, list) and "layer" in key and value and all(isinstance(one, int) for one in value):
            setattr(part, key, [one for one in value if one < depth])
    part.num_hidden_layers = depth


def _weights(config: Any) -> int:
    """How many weights the config would have; more than can be held where it cannot be built."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    except Exception:  # what a class raises for a config it does not like
        return MOST_WEIGHTS + 1


def _built(config: Any, cls: type | None) -> nn.Module | None:
    import torch
    from transformers import AutoModelForCausalLM

    config._attn_implementation = None
    try:
        model = cls._from_config(config, dtype=torch.float32) if cls is not None else AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _enlarge(model)
    except Exception:  # as above
        return None
    return model.float().eval()


def _enlarge(model: nn.Module) -> None:
    """Matrices that pass on what they are given at its size: with the usual small start, a wrong past would hardly show."""
    import torch
    from torch import nn

    with torch.no_grad():
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                if isinstance(module, nn.Embedding):
                    weight.normal_()
                elif weight.ndim in (2, 3) and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or "proj" in name):
                    weight.normal_(std=weight.shape[-1] ** -0.5)
