"""What a folder holds: a whole model, an adapter, both, pickled weights only, or neither; and whether its files are whole.

One place for every verb, read without weights: names, JSON, and the headers of safetensors files against their sizes. Nothing is loaded, so
that a damaged file is named when a config is checked and not in mid-run.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import ModelError

Kind = Literal["model", "adapter", "both", "pickled", "nothing"]
WEIGHTS, INDEX, ADAPTER_WEIGHTS = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "spm.model",
                "tekken.json")  # fmt: skip
"""Files of which a tokenizer needs at least one, or one that ends in `.tiktoken`."""
JSON_FILES = ("generation_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
MAX_HEADER = 100_000_000
"""Longest header that the safetensors format allows, bytes."""
SAVE_AGAIN = "load it once where you trust it and save it again with save_pretrained(folder), which writes safetensors"


@dataclass(frozen=True)
class Tensor:
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    file: Path


@dataclass(frozen=True)
class Folder:
    """What lies in a model folder, by its names alone."""

    path: Path
    files: frozenset[str]

    @property
    def weights(self) -> bool:
        """Whether weights of a whole model in safetensors are there, or announced by an index."""
        return INDEX in self.files or any(f.endswith(".safetensors") and not f.startswith("adapter_") for f in self.files)

    @property
    def adapter(self) -> bool:
        """Whether it says it is an adapter (PEFT's adapter_config.json)."""
        return "adapter_config.json" in self.files

    @property
    def pickled(self) -> tuple[str, ...]:
        """Weights in formats that can run code when they are read, or that are not read here."""
        return tuple(sorted(f for f in self.files if f.endswith(PICKLED) and not f.startswith(("training_args", "optimizer", "scheduler", "rng"))))

    @property
    def kind(self) -> Kind:
        """A config.json beside an adapter is the base's, and makes no whole model of it; whole weights beside an adapter do make both."""
        if self.adapter:
            if self.weights:
                return "both"
            return "adapter" if ADAPTER_WEIGHTS in self.files or not self.pickled else "pickled"
        if "config.json" in self.files or self.weights:
            return "pickled" if self.pickled and not self.weights else "model"
        return "pickled" if self.pickled else "nothing"

    @property
    def tokenizer(self) -> bool:
        """Whether a tokenizer's vocabulary is there."""
        return any(name in VOCABULARIES or name.endswith((".tiktoken", "tokenizer.model")) for name in self.files)

    @property
    def nested(self) -> tuple[str, ...]:
        """Folders in it that hold a model or an adapter of their own."""
        inner = sorted(self.path.iterdir())
        return tuple(p.name for p in inner if p.is_dir() and any((p / n).is_file() for n in ("adapter_config.json", "config.json")))


def is_folder(name: str | Path) -> bool:
    """Whether `name` is a folder here. Raises ModelError for a link that leads nowhere or in circles, and for one that may not be looked at."""
    path = Path(os.path.expanduser(name))
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        link = "\0" not in str(path) and path.is_symlink()
        if link:
            raise ModelError(f"{path} is a link to {os.readlink(path)!r}, which is not there; mend the link or name its target") from None
        return False
    except PermissionError:
        raise ModelError(f"{path} may not be read by this user; ask for the permission, or copy the folder to one of yours") from None
    except OSError as error:
        raise ModelError(f"{str(path)[:200]} cannot be looked at: {error.strerror}; name the folder itself") from None


def examine(path: Path) -> Folder:
    """The names in a folder. Raises ModelError where it cannot be read."""
    try:
        return Folder(path, frozenset(p.name for p in path.iterdir() if not p.is_dir()))
    except PermissionError:
        raise ModelError(f"{path} may not be read by this user; ask for the permission, or copy the folder to one of yours") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None


def check_model(path: Path) -> Folder:
    """A whole model, its files complete as far as names, JSON and headers tell. Raises ModelError, naming the file."""
    found = examine(path)
    if _seen(found, "model"):
        return found
    _check_kind(found, "model")
    settings = read_object(path / "config.json")
    if not isinstance(settings.get("model_type"), str) and "auto_map" not in settings:
        raise ModelError(f"{path / 'config.json'} names no model_type, so it is no model in Hugging Face format")
    _check_texts(found)
    if not found.tokenizer:
        raise ModelError(f"{path} holds no tokenizer (tokenizer.json, tokenizer.model, ...); copy the tokenizer's files beside the weights")
    tensors(path)
    _SOUND[path, "model"] = _stamp(found)
    return found


def check_adapter(path: Path) -> Folder:
    """The same for an adapter folder."""
    found = examine(path)
    if _seen(found, "adapter"):
        return found
    _check_kind(found, "adapter")
    if ADAPTER_WEIGHTS not in found.files:
        raise ModelError(f"the adapter in {path} holds no weights; {ADAPTER_WEIGHTS} is needed")
    read_object(path / "adapter_config.json")
    _check_texts(found)
    header(path / ADAPTER_WEIGHTS)
    _SOUND[path, "adapter"] = _stamp(found)
    return found


_SOUND: dict[tuple[Path, Kind], tuple] = {}
"""Folders found sound in this process and what their files looked like then: a model is asked for many times, a vocabulary is long."""


def _stamp(found: Folder) -> tuple:
    try:
        return tuple((name, (at := os.stat(found.path / name)).st_size, at.st_mtime_ns) for name in sorted(found.files))
    except OSError:  # a link that leads nowhere: what needs it says so
        return ()


def _seen(found: Folder, kind: Kind) -> bool:
    return bool(stamp := _stamp(found)) and _SOUND.get((found.path, kind)) == stamp


def _check_kind(found: Folder, wanted: Kind) -> None:
    """Raises ModelError, saying what is there instead."""
    path, kind = found.path, found.kind
    if kind == "both":
        raise ModelError(
            f"{path} holds a whole model and an adapter (adapter_config.json), and which of them is meant cannot be told; move the adapter's files "
            "into a folder of their own"
        )
    if kind == "pickled":
        needed = ADAPTER_WEIGHTS if found.adapter else "safetensors"
        raise ModelError(f"{path} holds only pickled weights ({found.pickled[0]}), which can run code when read; {needed} is needed: {SAVE_AGAIN}")
    if kind == wanted == "model":
        if "config.json" not in found.files:
            raise ModelError(f"{path} holds no config.json, so it is no model in Hugging Face format; copy it beside the weights")
        if not found.weights:
            raise ModelError(f"{path} holds no weights; {WEIGHTS}, or {INDEX} with its files, is needed")
        return
    if kind == wanted:
        return
    if kind == "adapter":
        base = read_object(path / "adapter_config.json").get("base_model_name_or_path")
        raise ModelError(
            f"{path} holds an adapter{f' for {base!r}' if base else ''}, not a whole model; give the model it was trained on, or merge the adapter "
            "into it first (peft: merge_and_unload, then save_pretrained)"
        )
    inner = found.nested if kind == "nothing" else ()
    hint = f"; it holds the folders {', '.join(inner[:4])}: name one of them" if inner else ""
    what = "adapter_config.json, so it is no adapter" if wanted == "adapter" else "config.json, so it is no model in Hugging Face format"
    raise ModelError(f"{path} holds no {what}{hint}")


def _check_texts(found: Folder) -> None:
    """The JSON files that transformers would read, or pass over without a word where they are broken."""
    for name in JSON_FILES:
        if name in found.files:
            read_object(found.path / name)
    for name in ("config.json", "generation_config.json"):
        if name in found.files:
            _check_ends(found.path / name)
    for name in ("chat_template.jinja", "merges.txt", "vocab.txt"):
        if name in found.files:
            read_text(found.path / name)


def _check_ends(path: Path) -> None:
    """Tokens that end an answer are numbers: a text would never be met, and every answer would run on."""
    body = read_object(path)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = body.get(key)
        numbers = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
            raise ModelError(f"{path}: {key} is {value!r}, not the number of a token or a list of them; copy it anew from where it came from")


def read_text(path: Path) -> str:
    """A text file of a model folder. Raises ModelError where it is not UTF-8 or cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is no UTF-8 text (byte {error.start}); it is damaged or of another format: copy it anew") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ModelError where the file is anything else."""
    text = read_text(path)
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.startswith("version https://git-lfs"):
            raise ModelError(f"{path} is a pointer of Git LFS, not the file itself; fetch it with git lfs pull") from None
        why = "it is empty" if not text.strip() else f"line {getattr(error, 'lineno', 1)}: {getattr(error, 'msg', error)}"
        raise ModelError(f"{path} is no JSON ({why}); copy it anew from where the model came from") from None
    if not isinstance(body, dict):
        raise ModelError(f"{path} holds {type(body).__name__} where an object {{...}} is needed; copy it anew from where the model came from")
    return body


# ------------------------------------------------------------------------------------------------ weights


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that transformers reads of a model folder: those of its index, else the one. Raises ModelError for an index that
    is damaged or names files that are not there."""
    named = read_object(path / "config.json").get("transformers_weights") if (path / "config.json").is_file() else None
    single = path / (named if isinstance(named, str) and named.endswith(".safetensors") else WEIGHTS)
    if single.is_file():
        return [single]
    if not (path / INDEX).is_file():
        is_folder(single)  # says of a link where it leads
        other = sorted(p.name for p in path.glob("*.safetensors") if not p.name.startswith("adapter_"))
        what = f"{other[0]}, but neither {WEIGHTS} nor {INDEX}, which says what is in which file" if other else "no weights in safetensors"
        raise ModelError(f"{path} holds {what}; copy the missing files beside it")
    shards = sorted(set(_weight_map(path).values()))
    for name in shards:
        if Path(name).name != name:
            raise ModelError(f"{path / INDEX} names {name!r}, which is no file of this folder; copy the index anew")
    gone = [name for name in shards if not (path / name).is_file()]
    if gone:
        raise ModelError(f"{path / INDEX} names {len(shards)} files, of which {len(gone)} are not there, e.g. {gone[0]}; copy them beside it")
    return [path / name for name in shards]


def _weight_map(path: Path) -> dict[str, str]:
    found = read_object(path / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(value, str) and value for value in found.values()):
        raise ModelError(f"{path / INDEX} has no weight_map of names to files; copy it anew")
    return found


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a model folder by name, from headers. Raises ModelError for files that are damaged, incomplete or not those of the index."""
    files = weight_files(path)
    found: dict[str, Tensor] = {}
    for file in files:
        found |= header(file)
    if not found:
        raise ModelError(f"{files[0]} holds no tensor; copy it anew")
    if (path / INDEX).is_file() and not (path / WEIGHTS).is_file():
        for name, file in _weight_map(path).items():
            if name not in found or found[name].file.name != file:
                raise ModelError(f"{path / INDEX} says that {file} holds {name}, but it does not; index and weights are of two models: copy all anew")
    return found


def header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file by name, its header held against its size. Raises ModelError for a file that is cut or damaged."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if first.startswith(b"version "):
                raise ModelError(f"{path} is a pointer of Git LFS, not the weights themselves; fetch them with git lfs pull")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise ModelError(f"{path} is no safetensors file, or is cut within its header ({size} bytes); copy it anew")
            body = json.loads(file.read(length).decode("utf-8"))
        entries = {name: entry for name, entry in body.items() if name != "__metadata__"}
        ends = [int(entry["data_offsets"][1]) for entry in entries.values()]
        found = {name: Tensor(str(entry["dtype"]), tuple(map(int, entry["shape"])), path) for name, entry in entries.items()}
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}; give this user the permission, or copy it anew") from None
    except (ValueError, RecursionError, KeyError, TypeError, IndexError, AttributeError):
        raise ModelError(f"{path} is no safetensors file: its header is damaged; copy it anew") from None
    wanted = 8 + length + max(ends, default=0)
    if size != wanted:
        how = "is cut" if size < wanted else "is longer than its header says"
        raise ModelError(f"{path} {how}: it has {size} bytes of {wanted}; copy it anew")
    return found
