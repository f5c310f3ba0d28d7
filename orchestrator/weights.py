"""Weights of a model by parameter name, each read from its file when it is asked for: for methods that compare two models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import config, model_folders, models
from orchestrator.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn


class FolderWeights(Mapping):
    """The tensors of a folder's safetensors files, in the type they are stored in. A lookup reads one tensor; nothing is kept."""

    def __init__(self, folder: str | Path):
        from safetensors import SafetensorError, safe_open

        self._files: dict[str, Path] = {}
        for path in model_folders.weight_files(Path(folder)):
            try:
                with safe_open(path, framework="pt") as tensors:
                    self._files |= dict.fromkeys(tensors.keys(), path)
            except SafetensorError as error:
                raise ModelError(f"{path} is no safetensors file, or is damaged: {error}") from error
        if not self._files:
            raise ModelError(f"{folder} holds no safetensors weights")

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._files[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def of_module(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model in memory, without copying them: do not write to them, and do not train the model they belong to."""
    return {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}


def of_name(name: str, like: config.Model, field: str = "model.unaligned_name_or_path") -> FolderWeights:
    """The weights behind a hub id, folder or `pocket` name. Raises ModelError, naming `field`, where its architecture is not that of `like`."""
    other = like.model_copy(update={"model_name_or_path": name, "revision": None})
    check_form(name, like, field)
    source = Path(models.resolve(other))
    return FolderWeights(source if source.is_dir() else _downloaded(str(source), field))


def check_form(name: str, like: config.Model, field: str = "model.unaligned_name_or_path") -> None:
    """The sizes in two models' config.json agree, so that weights can be subtracted; no weight is read or downloaded. Raises ModelError."""
    own = models.architecture(like)
    other = models.architecture(like.model_copy(update={"model_name_or_path": name, "revision": None}))
    for key in ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if own.get(key) != other.get(key):
            raise ModelError(
                f"{field}: {name!r} has {key} {other.get(key)}, {like.model_name_or_path!r} has {own.get(key)}; both must be one architecture"
            )


class Sources(Mapping):
    """Weights by role; each is opened when a method first asks for it, since a hub model that no recipe needs is not to be downloaded."""

    def __init__(self, makers: dict[str, Callable[[], Mapping[str, Tensor]]]):
        self._makers, self._made = makers, {}

    def __getitem__(self, role: str) -> Mapping[str, Tensor]:
        if role not in self._made:
            self._made[role] = self._makers[role]()
        return self._made[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def _downloaded(name: str, field: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(f"{field}: {name!r} could not be had from the hub: {' '.join(str(error).split())[:300]}") from error
