"""Data sets by name, through the `datasets` library: a hub that does not answer is found out in seconds, not in minutes of retries."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from orchestrator.errors import DataError
from orchestrator.storage import hub

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
MAX_NAME = 96


def is_name(source: str) -> bool:
    """Whether a text can be the name of a data set of the hub (`name`, `owner/name`, with `:configuration` or `::folder` after it)."""
    name, _, more = source.partition(":")
    if len(name) > MAX_NAME or _NAME.fullmatch(name) is None or "--" in name or ".." in name:
        return False
    return len(more) <= MAX_NAME and more.isprintable()


def short(text: str, most: int = 160) -> str:
    """A text in quotation marks, its middle left out where it is long."""
    return repr(text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}")


def unreachable() -> str | None:
    """Why the hub cannot be asked (`hub.away`, or HF_DATASETS_OFFLINE), None where it answers."""
    if os.environ.get("HF_DATASETS_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_DATASETS_OFFLINE forbids asking the hub"
    return hub.away()


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """The hub's libraries take what they hold on this machine and ask nobody."""
    import datasets
    from huggingface_hub import constants

    places = [(constants, "HF_HUB_OFFLINE")]
    if hasattr(datasets, "config"):
        places.append((datasets.config, "HF_HUB_OFFLINE"))
    before = [getattr(place, name) for place, name in places]
    for place, name in places:
        setattr(place, name, True)
    try:
        yield
    finally:
        for (place, name), value in zip(places, before, strict=True):
            setattr(place, name, value)


def load(source: str, split: str, field: str, suffixes: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a data set by name; from this machine's cache where the hub does not answer. Raises DataError in one sentence."""
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    folder = {"data_dir": configuration[1:]} if configuration.startswith(":") else {}
    silent = unreachable()
    try:
        with offline() if silent else contextlib.nullcontext():
            table = load_dataset(name, None if folder else configuration or None, split=split, **folder)
            return [dict(row) for row in table]
    except Exception as error:  # the library raises a dozen unrelated types; each ends as one sentence for the user
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if silent:
            said = f"{silent}, and what this machine has kept of the hub does not hold it: {said[:200]}"
        raise DataError(
            f"{field}: {source!r} is no file here{_files_like(source)}, and as a data set name (split {split!r}) it could not be loaded: "
            f"{said}. A local {'/'.join(suffixes)} file works without a network"
        ) from error


def _files_like(source: str) -> str:
    """Files of nearly this name, below the folder it names: what was meant, where the ending was forgotten."""
    import difflib
    from pathlib import Path

    path = Path(source)
    try:
        names = [one.name for _, one in zip(range(2000), path.parent.iterdir(), strict=False) if one.is_file()]
    except OSError:
        return ""
    stems: dict[str, str] = {}
    for name in names:
        stems.setdefault(name, name)
        stems.setdefault(Path(name).stem, name)
    close = difflib.get_close_matches(path.name, list(stems), n=3, cutoff=0.75)
    return f" (nearest: {', '.join(dict.fromkeys(stems[one] for one in close))})" if close else ""
