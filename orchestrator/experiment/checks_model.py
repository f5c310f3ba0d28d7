"""Everything about a model that is to be trained and can be known before a device is taken and without reading a weight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import config
from orchestrator.errors import ConfigError, ModelError, SafebasinError
from orchestrator.evaluation import capability, small_copy
from orchestrator.models import identity, loading, loading_report
from orchestrator.storage import paths

if TYPE_CHECKING:
    from torch import nn

    from strategies.base import Strategy
    from strategies.recipe import Recipe


def check(model: config.Model) -> tuple[int, list[str]]:
    """(its number of decoder layers, what users should know of how it is asked). Raises ModelError, in one sentence, for a model that is missing,
    damaged or incomplete, quantised, no causal language model, or one that cannot be asked right."""
    words, found = loading.tokenizer(model), loading.settings(model)
    if getattr(found, "quantization_config", None):
        raise ModelError(
            f"model {model.model_name_or_path!r} is quantised (quantization_config in config.json), so its weights cannot be trained or merged; give "
            "the one in full precision that it was made from"
        )
    check_kind(model, found)
    rows = getattr(found.get_text_config(), "vocab_size", None)
    if isinstance(rows, int):
        loading.check_vocabulary(model, rows, words)
    notes = _generation_config(model)
    notes += _towers(model, found, identity.shape(model))
    _check_weights(model)
    return identity.num_layers(model), [*notes, *_asked(model, found)]


def check_kind(model: config.Model, found: Any) -> None:
    """What config.json says the model is. Raises ModelError for what is no decoder that writes text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    name, kind = model.model_name_or_path, getattr(found, "model_type", "") or type(found).__name__
    remedy = "give a causal language model, one that writes from left to right (Llama, Qwen, Gemma, Mistral, ...)"
    if getattr(found, "is_encoder_decoder", False):
        raise ModelError(f"model {name!r} is an encoder with a decoder ({kind}), which this tool does not train; {remedy}")
    own = bool((getattr(found, "auto_map", None) or {}).get("AutoModelForCausalLM"))
    if own:
        return  # its own code, which runs only where the config says so; the probe looks at what it does
    if type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"model {name!r} is of the kind {kind}, for which transformers has no causal language model; {remedy}")
    named = list(getattr(found, "architectures", None) or ())
    usual = {_name(MODEL_FOR_CAUSAL_LM_MAPPING, found), _name(MODEL_MAPPING, found)}
    if named and not usual & set(named) and not any(one.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for one in named):
        raise ModelError(f"config.json of {name!r} says its weights are those of {named[0]}, which is no causal language model; {remedy}")


def _name(mapping: Any, found: Any) -> str:
    cls = mapping.get(type(found), None)
    return (cls[0] if isinstance(cls, tuple) else cls).__name__ if cls else ""


CHANGES_ANSWERS = {
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None, "sequence_bias": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None, "min_length": 0,
    "min_new_tokens": None, "exponential_decay_length_penalty": None, "num_beams": 1, "guidance_scale": None,
}  # fmt: skip
"""Settings of generation_config.json by which greedy answers become others, and what they are where nothing changes."""


def _generation_config(model: config.Model) -> list[str]:
    """What of it is not heeded here. Raises ModelError for what transformers would refuse only when the weights are loaded."""
    from transformers import GenerationConfig

    source = Path(loading.resolve(model))
    if not (source / "generation_config.json").is_file():
        return []
    try:
        own = GenerationConfig.from_pretrained(str(source))
        own.validate()
    except Exception as error:  # as for `loading.settings`
        raise loading.explained(model, error, "generation_config.json ") from error
    told = own.to_dict()
    other = [f"{key}={told[key]}" for key, neutral in CHANGES_ANSWERS.items() if told.get(key) not in (None, neutral)]
    if not other:
        return []
    return [
        f"generation_config.json of the model asks for {', '.join(other)}, which is not heeded here: answers are greedy and without penalties, and a "
        "server that heeds it may give others"
    ]


def _towers(model: config.Model, found: Any, shape: nn.Module) -> list[str]:
    """Parts beside the text model that config.json describes and transformers does not load."""
    from strategies import blocks, trying

    text = found.get_text_config()
    others = [name for name, part in vars(found).items() if part is not text and any(part is one for one in trying.parts(found))]
    if text is found or not others or blocks.unread(shape):
        return []
    return [
        f"{', '.join(sorted(others))}: config.json describes more than a text model, but transformers' causal language model of this family "
        f"({type(shape).__name__}) is the text part alone; what is trained and saved has no such part"
    ]


def _check_weights(model: config.Model) -> None:
    """The files hold this model, whole; of a hub id that is not here yet this is seen when it is loaded."""
    source = loading.resolve(model)
    if not paths.is_folder(source):
        return
    try:
        loading_report.look(model, source)
    except Exception as error:  # as for `loading.settings`
        raise loading.explained(model, error) from error


def _asked(model: config.Model, found: Any) -> list[str]:
    try:
        how = capability.of_config(found)
    except ModelError as error:
        raise ModelError(f"model {model.model_name_or_path!r}: {error}") from None
    if how is None:
        return [
            "how this model is to be asked (with a key-value cache or without) is found out when it is loaded: it is too large, or too unusual, "
            "for a small copy of it to be tried now"
        ]
    return [how.sentence] if how.sentence else []


def check_methods(model: config.Model, recipes: Mapping[str, Recipe]) -> list[str]:
    """Every method of the recipes (by name) can work on this architecture, tried on a small random copy of it; returns warnings.

    Raises ConfigError, in one sentence with the recipe's name; ModelError where the attention that is asked for cannot be had. Nothing is tried
    where no small copy can be made: the methods then look at the model itself when it is loaded.
    """
    from strategies.base import Strategy, StrategyError

    warnings: list[str] = []
    tried: set[tuple[str, Any]] = set()
    copy: nn.Module | None = None
    for name, recipe in recipes.items():
        for method in sorted(recipe.strategies, key=lambda one: one.setup_rank):
            if (method.name, method.config) in tried:
                continue
            tried.add((method.name, method.config))
            try:
                _check_attention(model, method)
                if type(method).check_model is Strategy.check_model:
                    continue
                if copy is None and (copy := _copy(model)) is None:
                    return warnings
                warnings += method.check_model(copy)
            except StrategyError as error:
                raise ConfigError(f"recipes: [{name}]: {error}") from error
            except SafebasinError:
                raise
            except Exception as error:  # whatever a model's own code raises: the method cannot work on it
                said = " ".join(str(error).split())[:200]
                raise ConfigError(
                    f"recipes: [{name}]: {method.name} does not work on this model: a small random copy of it, asked as the method would, ended "
                    f"in {type(error).__name__}: {said}; take another method, or another model"
                ) from error
    return warnings


def _check_attention(model: config.Model, method: Strategy) -> None:
    from strategies.base import StrategyError

    wanted = model.attn_implementation
    if wanted is not None and method.attention is not None and wanted not in method.attention:
        known = " or ".join(sorted(method.attention))
        raise StrategyError(f"{method.name} needs attention that can be differentiated again; set model.attn_implementation={known}, not {wanted}")


def _copy(model: config.Model) -> nn.Module | None:
    """The small copy, with the attention that is asked for where a CPU has it."""
    found = small_copy.of(loading.settings(model))
    if found is not None and model.attn_implementation in ("eager", "sdpa"):
        try:
            found.set_attn_implementation(model.attn_implementation)
        except (ValueError, ImportError) as error:
            raise loading.explained(model, error) from error
    return found
