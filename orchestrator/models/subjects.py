"""Any model somebody names: a folder, a hub id, `pocket...`, or a PEFT adapter folder put on its base; and what identifies it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator import config
from orchestrator.errors import ModelError
from orchestrator.models import adapters, folders, loading
from orchestrator.models import identity as models_identity
from orchestrator.storage import hub, paths

if TYPE_CHECKING:
    from torch import nn

    from strategies import merging


def is_adapter(name: str) -> bool:
    """Whether `name` is a folder with a PEFT adapter. Raises ModelError for a folder that cannot be read."""
    path = paths.expanded(name)
    return folders.is_folder(path) and folders.examine(path).adapter


def named(name: str, like: config.Model) -> config.Model:
    """The settings of `like` (dtype, template, system prompt, ...) for the model `name`; its revision only where the names agree."""
    kept = like.revision if name == like.model_name_or_path else None
    return like.model_copy(update={"model_name_or_path": name, "revision": kept})


def base_of(name: str, base: str | None = None) -> str:
    """What an adapter folder is put on: `base`, else the base its own config names. Raises ModelError where neither does."""
    if base is not None:
        return base
    folder = paths.expanded(name)
    own = folders.read_object(folder / "adapter_config.json").get("base_model_name_or_path")
    if not own:
        raise ModelError(f"the adapter in {name} does not say what it was trained on; name it with --baseline BASE")
    own = str(own)
    if own.count("/") != 1 and own != "pocket" and not own.startswith("pocket:") and not folders.is_folder(own):
        raise ModelError(f"the adapter in {name} was trained on {own!r}, which is not here; name its base with --baseline BASE{hub.near(own)}")
    return own


def voice(name: str, like: config.Model, base: str | None = None) -> adapters.Voice:
    """What a model is asked with, and whose that is; no weight is read. Raises ModelError for what cannot be asked: all that files tell."""
    if not is_adapter(name):
        words = loading.tokenizer(named(name, like))
        return adapters.Voice(words, {"template_of": "config" if like.chat_template else "model", "tokenizer_of": "model"})
    folder, under = paths.expanded(name), named(base_of(name, base), like)
    settings, found = adapters.check(folder), adapters.voice(folder, under)
    adapters.fit(folder, settings, models_identity.shape(under), found.tokenizer, under.model_name_or_path)
    return found


def for_base(base: str, like: config.Model, asked: adapters.Voice) -> config.Model:
    """The settings under which the baseline of a model is measured: its own template; that of the model (as `asked`) where it has none."""
    if like.chat_template or is_adapter(base) or loading.bare_tokenizer(named(base, like)).chat_template:
        return like
    return like.model_copy(update={"chat_template": asked.tokenizer.chat_template})


@dataclass(frozen=True)
class Subject:
    """A model ready to be asked."""

    network: nn.Module
    voice: adapters.Voice
    merge: merging.Merge | None = None
    """What merging its adapter did; None where nothing was merged."""


def opened(name: str, like: config.Model, *, base: str | None = None, device: str = "cpu", merge: bool = False) -> Subject:
    """A whole model or an adapter (on `base`, else on its own), in evaluation mode on `device`.

    With `merge` an adapter is added to its base's weights and the result is a plain model, held against the unmerged one's logits. Raises
    ModelError.
    """
    from strategies import merging
    from strategies.base import StrategyError

    if not is_adapter(name):
        network, _ = loading.load(named(name, like), device=device)
        return Subject(network, voice(name, like))
    network, asked = adapters.attach(paths.expanded(name), named(base_of(name, base), like), device=device)
    if not merge:
        return Subject(network, asked)
    try:
        network, seen = merging.measured(network, f"the adapter in {name}")
    except StrategyError as error:
        raise ModelError(str(error)) from error
    return Subject(network.eval(), asked, seen)


def load(name: str, like: config.Model, *, base: str | None = None, device: str = "cpu", merge: bool = False) -> tuple[nn.Module, Any]:
    """(network, tokenizer) of `opened`."""
    found = opened(name, like, base=base, device=device, merge=merge)
    return found.network, found.voice.tokenizer


def files(name: str, like: config.Model, base: str | None = None) -> tuple[config.Model, str | None]:
    """(settings of the whole model that lies on disk or on the hub, the adapter's folder or None), as `load` puts them together."""
    if not is_adapter(name):
        return named(name, like), None
    return named(base_of(name, base), like), str(paths.expanded(name))


def identity(name: str, like: config.Model, base: str | None = None) -> dict[str, str]:
    """What identifies a model: its name and a hash of its weights; for an adapter also its base and the base's hash."""
    if not is_adapter(name):
        return {"name": name, "hash": models_identity.model_hash(named(name, like))}
    folder, digest = paths.expanded(name), hashlib.sha256()
    for path in [folder / "adapter_config.json", *sorted(folder.glob("adapter_model*.safetensors"))]:
        digest.update(path.name.encode() + path.read_bytes())
    under = base_of(name, base)
    return {"name": name, "hash": digest.hexdigest()[:16], "base": under, "base_hash": models_identity.model_hash(named(under, like))}


def label(name: str) -> str:
    """A short name for tables: the last part of a path that exists (with the one above it where that alone says little), else the name."""
    path = paths.expanded(name)
    if not path.exists():
        return name
    path = path.resolve()
    return f"{path.parent.name}/{path.name}" if path.name in ("model", "best_model", "adapter") and path.parent.name else path.name


def slug(name: str) -> str:
    """A file name made of a model's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label(name)).strip("-.") or "model"
