"""Any model somebody names: a folder, a hub id, `pocket...`, or a PEFT adapter folder put on its base; and what identifies it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import config, models
from orchestrator.errors import ModelError

if TYPE_CHECKING:
    from torch import nn


def is_adapter(name: str) -> bool:
    """Whether `name` is a folder with a PEFT adapter."""
    return (Path(name).expanduser() / "adapter_config.json").is_file()


def named(name: str, like: config.Model) -> config.Model:
    """The settings of `like` (dtype, template, system prompt, ...) for the model `name`; its revision only where the names agree."""
    kept = like.revision if name == like.model_name_or_path else None
    return like.model_copy(update={"model_name_or_path": name, "revision": kept})


def base_of(name: str, base: str | None = None) -> str:
    """What an adapter folder is put on: `base`, else the base its own config names. Raises ModelError where neither does."""
    if base is not None:
        return base
    own = json.loads((Path(name).expanduser() / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not own:
        raise ModelError(f"the adapter in {name} does not say what it was trained on; name it with --baseline BASE")
    return str(own)


def load(name: str, like: config.Model, *, base: str | None = None, device: str = "cpu", merge: bool = False) -> tuple[nn.Module, Any]:
    """(model in evaluation mode on `device`, tokenizer) of a whole model or an adapter (on `base`, else on its own).

    With `merge` an adapter is added to its base's weights and the result is a plain model. Raises ModelError.
    """
    if not is_adapter(name):
        return models.load(named(name, like), device=device)
    network, tokenizer = models.attach(Path(name).expanduser(), named(base_of(name, base), like), device=device)
    return (network.merge_and_unload().eval() if merge else network), tokenizer


def files(name: str, like: config.Model, base: str | None = None) -> tuple[config.Model, str | None]:
    """(settings of the whole model that lies on disk or on the hub, the adapter's folder or None), as `load` puts them together."""
    if not is_adapter(name):
        return named(name, like), None
    return named(base_of(name, base), like), str(Path(name).expanduser())


def identity(name: str, like: config.Model, base: str | None = None) -> dict[str, str]:
    """What identifies a model: its name and a hash of its weights; for an adapter also its base and the base's hash."""
    if not is_adapter(name):
        return {"name": name, "hash": models.model_hash(named(name, like))}
    folder, digest = Path(name).expanduser(), hashlib.sha256()
    for path in [folder / "adapter_config.json", *sorted(folder.glob("adapter_model*.safetensors"))]:
        digest.update(path.name.encode() + path.read_bytes())
    under = base_of(name, base)
    return {"name": name, "hash": digest.hexdigest()[:16], "base": under, "base_hash": models.model_hash(named(under, like))}


def label(name: str) -> str:
    """A short name for tables: the last part of a path that exists (with the one above it where that alone says little), else the name."""
    path = Path(name).expanduser()
    if not path.exists():
        return name
    path = path.resolve()
    return f"{path.parent.name}/{path.name}" if path.name in ("model", "best_model", "adapter") and path.parent.name else path.name


def slug(name: str) -> str:
    """A file name made of a model's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label(name)).strip("-.") or "model"
