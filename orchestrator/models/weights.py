"""Weights of a model by parameter name, each read from its file when it is asked for: for methods that compare two models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import config
from orchestrator.errors import ModelError
from orchestrator.models import folders, identity, loading

if TYPE_CHECKING:
    from torch import Tensor, nn


SIZES = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size",
)  # fmt: skip
"""Settings in which two models of one form agree."""


class FolderWeights(Mapping):
    """The tensors of a folder's safetensors files, in the type they are stored in. A lookup reads one tensor; of batches of matrices (experts),
    which are read matrix by matrix, the last one is kept.

    named: the name a caller asks for -> the name in the files; without it they are the same.
    """

    def __init__(self, folder: str | Path, named: Mapping[str, str] | None = None):
        from safetensors import SafetensorError, safe_open

        self._files: dict[str, Path] = {}
        self._last: tuple[str, Tensor] | None = None
        for path in folders.weight_files(Path(folder)):
            try:
                with safe_open(path, framework="pt") as tensors:
                    self._files |= dict.fromkeys(tensors.keys(), path)
            except SafetensorError as error:
                raise ModelError(f"{path} is no safetensors file, or is damaged: {error}") from error
        if not self._files:
            raise ModelError(f"{folder} holds no safetensors weights")
        self._named = dict(named) if named is not None else {name: name for name in self._files}

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        if self._last is not None and self._last[0] == name:
            return self._last[1]
        own = self._named[name]
        with safe_open(self._files[own], framework="pt") as tensors:
            found = tensors.get_tensor(own)
        self._last = (name, found) if found.ndim == 3 else None
        return found

    @property
    def files(self) -> frozenset[str]:
        """Names of the tensors in the files."""
        return frozenset(self._files)

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)


def of_module(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model in memory, without copying them: do not write to them, and do not train the model they belong to."""
    return {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}


def of_name(name: str, like: config.Model, field: str = "model.unaligned_name_or_path") -> Mapping[str, Tensor]:
    """The weights behind a hub id, folder or `pocket` name, by the names a loaded model has. Raises ModelError, naming `field`, where its
    architecture is not that of `like`.

    They are read one at a time where the files have those names, or the same without the prefix of the model without its head (GPT-2's own
    files); else the whole model is loaded, since transformers turns old names, and experts that lie in files one by one, into others.
    """
    other = like.model_copy(update={"model_name_or_path": name, "revision": None})
    check_form(name, like, field)
    source = Path(loading.resolve(other))
    folder = source if source.is_dir() else _downloaded(str(source), field)
    named = _names_in(FolderWeights(folder).files, identity.shape(other))
    if named is None:
        return of_module(loading.network(other))
    return FolderWeights(folder, named)


def _names_in(files: frozenset[str], shape: nn.Module) -> dict[str, str] | None:
    """Parameter of the model -> its tensor in the files; None where some are there under other names."""
    prefix = f"{getattr(shape, 'base_model_prefix', '')}."
    found = {}
    for name, _ in shape.named_parameters():
        own = name if name in files else name.removeprefix(prefix)
        if own not in files:
            return None
        found[name] = own
    return found


def check_form(name: str, like: config.Model, field: str = "model.unaligned_name_or_path") -> None:
    """The sizes in two models' config.json agree, so that weights can be subtracted; no weight is read or downloaded. Raises ModelError."""
    own = identity.architecture(like)
    other = identity.architecture(like.model_copy(update={"model_name_or_path": name, "revision": None}))
    for key in SIZES:
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
