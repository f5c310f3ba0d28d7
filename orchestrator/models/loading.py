"""Models in Hugging Face format: loaded, copied for a trial, saved, loaded back, hashed.

Only safetensors weights are read (a pickle can run code), and code that ships with a model only runs where the config says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator import config
from orchestrator.data import template as data_template
from orchestrator.data import template_limits
from orchestrator.errors import ModelError, brief
from orchestrator.models import folders, loading_report
from orchestrator.storage import hub, paths

if TYPE_CHECKING:
    from torch import nn

TEMPLATE_EXAMPLE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""A template that works for any tokenizer with a beginning and an end token; shown where a model has none."""


# ------------------------------------------------------------------------------------------------ load


def load(model: config.Model, *, device: str = "cpu") -> tuple[nn.Module, Any]:
    """(model in evaluation mode on `device`, tokenizer with a pad token and a chat template).

    `model.model_name_or_path`: `pocket`, a local folder, or a hub id with an optional `revision`. A missing pad token becomes the end
    token; embeddings are not resized. Raises ModelError for a model that is missing, cannot be reached, has pickled weights only, is
    no causal language model, is damaged, or has no chat template.
    """
    words = tokenizer(model)
    loaded = network(model)
    check_vocabulary(model, loaded.get_input_embeddings().weight.shape[0], words)
    return loaded.to(device).eval(), words


def network(model: config.Model) -> nn.Module:
    """The weights alone, on the CPU in evaluation mode. Raises ModelError, also where the files lack a tensor of the model, which
    transformers would start at random, or hold what the model has no place for (`loading_report`)."""
    import torch
    from transformers import AutoModelForCausalLM

    source = resolve(model)
    options = {"attn_implementation": model.attn_implementation} if model.attn_implementation else {}
    dtype = "auto" if model.dtype == "auto" else getattr(torch, model.dtype)
    try:
        with loading_report.quiet():
            loaded, told = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,
                revision=model.revision or "main",
                trust_remote_code=model.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # the report names them; they are refused below
                **options,
            )
    except Exception as error:  # config classes, custom code and damaged files raise what they like; all of it is about this model
        raise explained(model, error) from error
    loading_report.refuse(model, loaded, told)
    loading_report.check_finite(model, loaded)
    return loaded.eval()


def tokenizer(model: config.Model) -> Any:
    """The tokenizer alone, with pad token and chat template set as for `load`."""
    words = bare_tokenizer(model)
    if model.chat_template:
        words.chat_template = template(model.chat_template)
    return finished(words, model.model_name_or_path)


def bare_tokenizer(model: config.Model) -> Any:
    """The tokenizer as it lies with the model: with its own template or none. Raises ModelError."""
    from transformers import AutoTokenizer

    settings(model)  # one request that fails as a sentence, before the tokenizer's several
    try:
        return AutoTokenizer.from_pretrained(resolve(model), revision=model.revision or "main", trust_remote_code=model.trust_remote_code)
    except Exception as error:  # tokenizers raises bare exceptions for damaged files
        raise explained(model, error, "tokenizer ") from error


def finished(words: Any, name: str) -> Any:
    """The tokenizer with a pad token and a template that heeds `add_generation_prompt`.

    Raises ModelError where it has no chat template, one that cannot be used, or no end token; `name` is whose it is.
    """
    if not words.chat_template:
        raise ModelError(
            f"model {name!r} has no chat template, so prompts and answers cannot be told apart; set "
            "model.chat_template "
            f"to a Jinja text or the path of a .jinja file, e.g. {TEMPLATE_EXAMPLE}"
        )
    if words.eos_token_id is None:
        raise ModelError(f"the tokenizer of {name!r} has no end-of-sequence token, so answers would never end; set eos_token in it")
    if words.pad_token_id is None:
        words.pad_token = words.eos_token
    template_limits.check(words.chat_template, words.special_tokens_map, name)
    data_template.correct(words)
    return words


def resolve(model: config.Model) -> str:
    """The folder or hub id that transformers is given; for a hub that is away, the folder of the local cache.

    Raises ModelError for a folder without the files a model needs or with damaged ones, and for a hub id that is neither here nor to be had.
    """
    name = model.model_name_or_path
    if name == "pocket" or name.startswith("pocket:"):
        from orchestrator import pocket

        return str(pocket.resolve(name))
    path = paths.expanded(name)
    if folders.is_folder(path):
        folders.check_model(path)
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or paths.exists(path):
        kind = "is a file, not a folder" if paths.exists(path) else "does not exist"
        raise ModelError(
            f"model.model_name_or_path: {name!r} {kind}; give a folder in Hugging Face format, a hub id (owner/name) or `pocket`{hub.near(name)}"
        )
    return hub.model(name, model.revision)


def template(text: str) -> str:
    if paths.is_file(text):
        return paths.read_text(text, "model.chat_template:", most=1_000_000)
    if "{" not in text:
        raise ModelError(f"model.chat_template: {brief(text)} is neither a Jinja text (it has no braces) nor an existing file")
    return text


def explained(model: config.Model, error: Exception, part: str = "") -> ModelError:
    """One sentence with a remedy for what transformers said."""
    if isinstance(error, ModelError):
        return error
    name, said = model.model_name_or_path, " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in said:
        return ModelError(f"model {name!r} ships its own code; read it, then set model.trust_remote_code=true")
    if not part and "does not appear to have a file named" in said and ("safetensors" in said or "pytorch_model.bin" in said):
        return ModelError(
            f"model {brief(name)} has no safetensors weights; pickled ones are not read because they can run code. "
            "Pick a revision or a copy with safetensors"
        )
    if not paths.exists(name):
        at = f" at revision {model.revision!r}" if model.revision else ""
        return ModelError(
            f"model {brief(name)}{at} is no folder here and could not be had from the hub: {said[:300]}. Check the name, the network "
            "(HF_ENDPOINT) and, for "
            "gated models, HF_TOKEN; or download it elsewhere and give the folder"
        )
    return ModelError(f"{f'the {part}of' if part else 'model'} {name!r} cannot be loaded: {said[:400]}")


def check_vocabulary(model: config.Model, rows: int, tokenizer: Any) -> None:
    """A tokenizer with more entries than the embedding has rows would crash later with an index error that says nothing."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise ModelError(
            f"the tokenizer of {model.model_name_or_path!r} has ids up to {largest}, the model has {rows} "
            "embeddings; they do not belong together"
        )


# ------------------------------------------------------------------------------------------------ facts without weights


def settings(model: config.Model) -> Any:
    """What transformers makes of config.json. Raises ModelError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolve(model), revision=model.revision or "main", trust_remote_code=model.trust_remote_code)
    except Exception as error:  # a config class checks its values by whatever it raises
        raise explained(model, error) from error


# ------------------------------------------------------------------------------------------------ copies for trials


# ------------------------------------------------------------------------------------------------ save and load back
