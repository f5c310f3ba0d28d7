"""What identifies a model and its shape, without reading a weight: layers, sizes, hashes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import config
from orchestrator.errors import ModelError
from orchestrator.models.loading import explained, resolve, settings
from orchestrator.storage import paths

if TYPE_CHECKING:
    from torch import nn


def num_layers(model: config.Model) -> int:
    """Number of decoder blocks, of the model as config.json describes it, without its weights. Raises ModelError where none are found."""
    from strategies import blocks
    from strategies.base import StrategyError

    try:
        return blocks.of(shape(model)).count
    except StrategyError as error:
        raise ModelError(f"model {model.model_name_or_path!r}: {error}") from None


def architecture(model: config.Model) -> dict[str, Any]:
    """What config.json says of the model's sizes."""
    return settings(model).get_text_config().to_dict()


def shape(model: config.Model) -> nn.Module:
    """The model without weights (on the meta device), in the type it would be loaded in; for counting. Raises ModelError."""
    import torch
    from transformers import AutoModelForCausalLM

    found = settings(model)
    dtype = (getattr(found, "dtype", None) or torch.float32) if model.dtype == "auto" else getattr(torch, model.dtype)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(found, dtype=dtype, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # as for `settings`
        raise explained(model, error) from error


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
        raise explained(model, error) from error
    return path.parent.name


def model_hash(model: config.Model | str) -> str:
    """Identity of the weights: sha256 over config.json and the safetensors of a folder (16 digits); `hub:<commit>` for a hub id."""
    if isinstance(model, str):
        model = config.Model(model_name_or_path=model)
    source = resolve(model)
    if not paths.is_folder(source):
        return f"hub:{_commit(model, source)}"
    if "pocket" not in model.model_name_or_path and not paths.is_folder(model.model_name_or_path):
        return f"hub:{Path(source).name}"  # a hub's cache names the folder by the commit
    digest = hashlib.sha256()
    for path in [Path(source) / "config.json", *sorted(Path(source).glob("*.safetensors"))]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 22), b""):
                digest.update(block)
    return digest.hexdigest()[:16]
