"""Models in Hugging Face format: loaded, copied for a trial, saved, loaded back, hashed.

Only safetensors weights are read (a pickle can run code), and code that ships with a model only runs where the config says so.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import config
from orchestrator.errors import ModelError

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
    no causal language model, or has no chat template.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    source = resolve(model)
    words = tokenizer(model)
    options = {"attn_implementation": model.attn_implementation} if model.attn_implementation else {}
    dtype = "auto" if model.dtype == "auto" else getattr(torch, model.dtype)
    try:
        network = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            revision=model.revision or "main",
            trust_remote_code=model.trust_remote_code,
            **options,
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise _explained(model, error) from error
    _check_vocabulary(model, network, words)
    return network.to(device).eval(), words


def tokenizer(model: config.Model) -> Any:
    """The tokenizer alone, with pad token and chat template set as for `load`."""
    from transformers import AutoTokenizer

    _config(model)  # one request that fails as a sentence, before the tokenizer's several
    try:
        words = AutoTokenizer.from_pretrained(resolve(model), revision=model.revision or "main", trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise _explained(model, error) from error
    if model.chat_template:
        words.chat_template = _template(model.chat_template)
    if not words.chat_template:
        raise ModelError(
            f"model {model.model_name_or_path!r} has no chat template, so prompts and answers cannot be told apart; set "
            "model.chat_template "
            f"to a Jinja text or the path of a .jinja file, e.g. {TEMPLATE_EXAMPLE}"
        )
    if words.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {model.model_name_or_path!r} has no end-of-sequence token, so answers would never end; set eos_token in it"
        )
    if words.pad_token_id is None:
        words.pad_token = words.eos_token
    return words


def resolve(model: config.Model) -> str:
    """The folder or hub id that transformers is given. Raises ModelError for a folder without the files a model needs."""
    name = model.model_name_or_path
    if name == "pocket" or name.startswith("pocket:"):
        from orchestrator import pocket

        return str(pocket.resolve(name))
    path = Path(name).expanduser()
    if path.is_dir():
        _check_folder(path)
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.is_file():
        kind = "is a file, not a folder" if path.is_file() else "does not exist"
        raise ModelError(
            f"model.model_name_or_path: {name!r} {kind}; give a folder in Hugging Face format, a hub id (owner/name) or `pocket`"
        )
    return name


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise ModelError(f"{path} holds an adapter, not a whole model; give the model it was trained on, or merge it first")
        raise ModelError(f"{path} holds no config.json, so it is no model in Hugging Face format")
    if not any(path.glob("*.safetensors")):
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
        why = f"only pickled weights ({pickled[0]}), which can run code when read" if pickled else "no weights"
        raise ModelError(f"{path} holds {why}; safetensors are needed: load it once where you trust it and call save_pretrained(folder)")


def _template(text: str) -> str:
    path = Path(text).expanduser() if "\n" not in text and "{" not in text else None
    if path is None:
        return text
    if not path.is_file():
        raise ModelError(f"model.chat_template: {text!r} is neither a Jinja text (it has no braces) nor an existing file")
    return path.read_text(encoding="utf-8")


def _explained(model: config.Model, error: Exception) -> ModelError:
    """One sentence with a remedy for what transformers said."""
    name, said = model.model_name_or_path, " ".join(str(error).split())
    if "trust_remote_code" in said:
        return ModelError(f"model {name!r} ships its own code; read it, then set model.trust_remote_code=true")
    if "safetensors" in said or "pytorch_model.bin" in said:
        return ModelError(
            f"model {name!r} has no safetensors weights; pickled ones are not read because they can run code. "
            "Pick a revision or a copy with safetensors"
        )
    if not Path(name).expanduser().exists():
        at = f" at revision {model.revision!r}" if model.revision else ""
        return ModelError(
            f"model {name!r}{at} is no folder here and could not be had from the hub: {said[:300]}. Check the name, the network "
            "(HF_ENDPOINT) and, for "
            "gated models, HF_TOKEN; or download it elsewhere and give the folder"
        )
    return ModelError(f"model {name!r} cannot be loaded: {said[:400]}")


def _check_vocabulary(model: config.Model, network: nn.Module, tokenizer: Any) -> None:
    """A tokenizer with more entries than the embedding has rows would crash later with an index error that says nothing."""
    rows, largest = network.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ModelError(
            f"the tokenizer of {model.model_name_or_path!r} has ids up to {largest}, the model has {rows} "
            "embeddings; they do not belong together"
        )


# ------------------------------------------------------------------------------------------------ facts without weights


def _config(model: config.Model) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolve(model), revision=model.revision or "main", trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _explained(model, error) from error


def num_layers(model: config.Model) -> int:
    """Number of decoder layers, read from config.json alone. Raises ModelError where it is not said there."""
    body = _config(model).get_text_config()
    count = getattr(body, "num_hidden_layers", None)
    if not count:
        raise ModelError(f"config.json of {model.model_name_or_path!r} names no num_hidden_layers; layer knobs cannot be used with it")
    return int(count)


def architecture(model: config.Model) -> dict[str, Any]:
    """What config.json says of the model's sizes."""
    return _config(model).get_text_config().to_dict()


def shape(model: config.Model) -> nn.Module:
    """The model without weights (on the meta device), in the type it would be loaded in; for counting. Raises ModelError."""
    import torch
    from transformers import AutoModelForCausalLM

    found = _config(model)
    dtype = (getattr(found, "dtype", None) or torch.float32) if model.dtype == "auto" else getattr(torch, model.dtype)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(found, dtype=dtype, trust_remote_code=model.trust_remote_code)
    except (ValueError, ImportError, KeyError) as error:
        raise _explained(model, error) from error


def template_hash(tokenizer: Any) -> str:
    """sha256 of the chat template and the tokens it is filled with (16 digits)."""
    text = json.dumps([tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _commit(model: config.Model, source: str) -> str:
    """The commit a hub id stands for now, as the local cache names the folder it keeps it in."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = Path(hf_hub_download(source, "config.json", revision=model.revision or "main"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise _explained(model, error) from error
    return path.parent.name


def model_hash(model: config.Model | str) -> str:
    """Identity of the weights: sha256 over config.json and the safetensors of a folder (16 digits); `hub:<commit>` for a hub id."""
    if isinstance(model, str):
        model = config.Model(model_name_or_path=model)
    source = resolve(model)
    if not Path(source).is_dir():
        return f"hub:{_commit(model, source)}"
    digest = hashlib.sha256()
    for path in [Path(source) / "config.json", *sorted(Path(source).glob("*.safetensors"))]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 22), b""):
                digest.update(block)
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ copies for trials


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Copies of all weights and buffers by name, tied ones once."""
    seen: dict[int, str] = {}
    state = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if id(tensor) not in seen:
            seen[id(tensor)] = name
            state[name] = tensor.detach().clone()
    return state


def restore(model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    """Write a snapshot back, bit for bit, into the model it was taken of (or one of the same form). Raises KeyError for other forms."""
    import torch

    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    missing = set(state) - set(tensors)
    if missing:
        raise KeyError(f"the model lacks {len(missing)} tensors of the snapshot, e.g. {sorted(missing)[0]}")
    with torch.no_grad():
        for name, tensor in state.items():
            tensors[name].copy_(tensor)
    return model


def base(cache: dict[Any, Any], model: config.Model, device: str = "cpu") -> tuple[nn.Module, Any]:
    """(fresh untouched model, tokenizer): loaded once per lane, copied in memory for every trial.

    The copy is bit-identical each time, shares no storage with the cached one, keeps tied weights tied, needs gradients everywhere and
    is in evaluation mode. One untouched copy is kept, on the CPU, under `("base model", ...)` in `cache`.
    """
    network, tokenizer = _kept(cache, model)
    return copy.deepcopy(network).to(device), copy.deepcopy(tokenizer)


def kept(cache: dict[Any, Any], model: config.Model) -> nn.Module:
    """The untouched copy `base` makes its copies of; only for reading."""
    return _kept(cache, model)[0]


def _kept(cache: dict[Any, Any], model: config.Model) -> tuple[nn.Module, Any]:
    key = ("base model", json.dumps(model.model_dump(mode="json"), sort_keys=True))
    if key not in cache:
        for stale in [k for k in cache if isinstance(k, tuple) and k and k[0] == "base model"]:
            del cache[stale]
        cache[key] = load(model)
    return cache[key]


# ------------------------------------------------------------------------------------------------ save and load back


def save(model: nn.Module, tokenizer: Any, folder: str | Path, extra_meta: Mapping[str, Any] | None = None) -> Path:
    """Write a trained model: an adapter folder for a PEFT model, else a whole model in safetensors; tokenizer and template with it.

    `extra_meta` goes into `safebasin.json`. Raises ModelError where what was written is empty or not finite, so that no broken
    result is handed over as a model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    _check_saved(folder)
    (folder / "safebasin.json").write_text(
        json.dumps(dict(extra_meta or {}), indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8"
    )
    return folder


def _check_saved(folder: Path) -> None:
    import torch
    from safetensors import safe_open

    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = tensors.get_tensor(name)
                count += tensor.numel()
                if tensor.numel() == 0:
                    raise ModelError(
                        f"{path.name} in {folder} holds the empty tensor {name}: weights were still sharded when they were saved"
                    )
                if not torch.isfinite(tensor).all():
                    raise ModelError(f"{path.name} in {folder} holds NaN or infinite weights in {name}; the training diverged")
    if not count:
        raise ModelError(f"nothing was written to {folder}: the model has no weights to save")


def attach(folder: str | Path, model: config.Model, *, device: str = "cpu") -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a folder written by `save`: an adapter is put on the base `model` names, a whole model is loaded as it is.

    Raises ModelError for a folder that holds neither.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        whole = model.model_copy(update={"model_name_or_path": str(folder), "revision": None, "chat_template": None})
        return load(whole, device=device)
    from peft import PeftModel
    from safetensors import SafetensorError

    if not (folder / "adapter_model.safetensors").is_file():
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        why = f"only pickled weights ({pickled[0]}), which can run code when read" if pickled else "no weights"
        raise ModelError(
            f"the adapter in {folder} holds {why}; adapter_model.safetensors is needed: load it once where you trust it and save it again"
        )
    network, words = load(model)
    try:
        network = PeftModel.from_pretrained(network, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"the adapter in {folder} does not fit {model.model_name_or_path!r}: {' '.join(str(error).split())[:300]}"
        ) from error
    _check_adapter(folder, network, model)
    return network.to(device).eval(), words


def _check_adapter(folder: Path, network: nn.Module, model: config.Model) -> None:
    """peft ignores adapter weights for layers the model lacks, and starts those the file lacks at random; both are refused."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        written = set(tensors.keys())
    wanted = set(get_peft_model_state_dict(network))
    if written != wanted:
        odd = sorted(written ^ wanted)[0]
        raise ModelError(
            f"the adapter in {folder} does not fit {model.model_name_or_path!r}: {len(written ^ wanted)} tensors "
            f"have no counterpart, e.g. {odd}"
        )
