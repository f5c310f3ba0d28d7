"""Models written to a folder and read back: empty, not finite, or other than in memory is an error, never a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import ModelError
from orchestrator.models import loading_report
from orchestrator.storage import files, sealing

if TYPE_CHECKING:
    from torch import nn
from typing import TYPE_CHECKING

from orchestrator import config
from orchestrator.models import folders
from orchestrator.models.loading import load
from orchestrator.storage import paths

if TYPE_CHECKING:
    from torch import nn


def save(model: nn.Module, tokenizer: Any, folder: str | Path, extra_meta: Mapping[str, Any] | None = None) -> Path:
    """As `saving.save`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    before = sealing.names_in(folder, "model")
    write(model, folder)
    tokenizer.save_pretrained(folder)
    check_saved(folder, model)
    for path in folder.glob("*.safetensors"):  # written for their owner alone by the library; a model is handed over with the umask's mode
        path.chmod(files.file_mode())
    (folder / "safebasin.json").write_text(
        json.dumps(dict(extra_meta or {}), indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8"
    )
    sealing.sealed(folder, "model", before)
    return folder


def write(model: nn.Module, folder: str | Path) -> None:
    """The weights alone: an adapter of a PEFT model, else all. Raises ModelError; what the disk says is raised as it is."""
    own = {}
    if hasattr(model, "get_base_model"):  # said here, since peft would ask the hub for the base's vocabulary, for half a minute where it is away
        own["save_embedding_layers"] = bool(getattr(model.get_base_model(), "embeddings_belong_to_the_adapter", False))
    try:
        model.save_pretrained(folder, safe_serialization=True, **own)
    except ValueError as error:
        raise ModelError(f"the model cannot be written to {folder}: {' '.join(str(error).split())[:300]}") from error


def check_saved(folder: Path, model: nn.Module | None = None) -> None:
    """Read back what was written: every tensor has values, all finite, and those of `model` (a whole one) where the name is the same.

    Raises ModelError, also where config.json ties the head to the embedding and the files hold two that differ.
    """
    import torch
    from safetensors import safe_open

    whole = model is not None and not hasattr(model, "get_base_model")
    wanted = dict(model.named_parameters(remove_duplicate=False)) if whole else {}
    count, seen = 0, set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = tensors.get_tensor(name)
                count += tensor.numel()
                seen.add(name)
                if tensor.numel() == 0:
                    raise ModelError(
                        f"{path.name} in {folder} holds the empty tensor {name}: weights were still sharded when they were saved"
                    )
                if not torch.isfinite(tensor).all():
                    raise ModelError(f"{path.name} in {folder} holds NaN or infinite weights in {name}; the training diverged")
                if name in wanted and not torch.equal(tensor, wanted[name].detach().to("cpu", tensor.dtype)):
                    raise ModelError(f"{path.name} in {folder} holds other values in {name} than the model that was saved; is the disk sound?")
    if not count:
        raise ModelError(f"nothing was written to {folder}: the model has no weights to save")
    _check_ends(folder, model if whole else None, seen)


def _check_ends(folder: Path, model: nn.Module | None, seen: set[str]) -> None:
    """A head with weights of its own must be written, and not be tied again by config.json when the folder is loaded."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings()) if model is not None else (None, None)
    if None in ends or ends[0].weight is ends[1].weight:
        return
    head = next((name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is ends[1].weight), None)
    says = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    lost = head is not None and head not in seen and head in _missing(folder)  # some families call it otherwise in their files
    if lost or head is not None and says.get("tie_word_embeddings", True) and "tie_word_embeddings" in says:
        raise ModelError(
            f"{folder} would come back with its head ({head}) tied to the embedding, though the model has two that differ: config.json must say "
            "tie_word_embeddings: false and the file hold both"
        )


def _missing(folder: Path) -> frozenset[str]:
    """Names of the tensors that a model loaded from the folder would lack, by transformers' own reading of its headers."""
    from transformers import AutoModelForCausalLM

    with loading_report.quiet():
        _, told = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, device_map="meta"
        )
    return frozenset(told.get("missing_keys") or ())


def attach(folder: str | Path, model: config.Model, *, device: str = "cpu") -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a folder written by `save`: an adapter is put on the base `model` names and asked as its folder says, a whole
    model is loaded as it is.

    Raises ModelError for a folder that holds neither.
    """
    from orchestrator.models import adapters

    folder = paths.expanded(folder)
    if folders.is_folder(folder) and folders.examine(folder).adapter:
        loaded, said = adapters.attach(folder, model, device=device)
        return loaded, said.tokenizer
    whole = model.model_copy(update={"model_name_or_path": str(folder), "revision": None, "chat_template": None})
    return load(whole, device=device)
