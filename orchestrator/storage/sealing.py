"""The list of a folder that a library writes as a whole: a model, the pocket world."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from pathlib import Path

from orchestrator.storage.ownership import Owned, marker_name, read


def names_in(folder: Path, kind: str) -> set[str]:
    """Every name below a folder but that of its list; a folder's ends in a slash."""
    paths = folder.rglob("*") if folder.is_dir() else ()
    return {path.relative_to(folder).as_posix() + "/" * (path.is_dir() and not path.is_symlink()) for path in paths if path.name != marker_name(kind)}


def sealed(folder: Path, kind: str, before: Iterable[str] = ()) -> list[str]:
    """List what a library has just written into a folder, which is all that was not there `before`; the files, sorted. Raises StorageError."""
    made = names_in(folder, kind) - set(before)
    known_before = read(folder, kind)
    if known_before is not None:
        made |= known_before.made & set(before)
    Owned(folder, kind, uuid.uuid5(uuid.NAMESPACE_OID, "\n".join(sorted(made))).hex, made).save()  # the same model gives the same files
    return sorted(name for name in made if not name.endswith("/"))
