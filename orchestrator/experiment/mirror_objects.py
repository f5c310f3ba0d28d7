"""What a run owns below an address: the objects on the list that it keeps there itself (`ownership`). Others are neither replaced nor deleted."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable
from pathlib import Path

from orchestrator.errors import ConfigError
from orchestrator.storage import ownership
from orchestrator.storage.buckets import Store
from orchestrator.storage.ownership import Owned

log = logging.getLogger(__name__)

KIND = "mirror"
MARKER = ownership.marker_name(KIND)


def read(store: Store) -> Owned | None:
    """The list at an address; None where there is none. Raises NotOurs for one that we did not write, StorageError."""
    text = store.read(MARKER)
    return None if text is None else ownership.parse(text, Path(), KIND, f"{store.shown}/{MARKER}")


def check(store: Store, *, overwrite: bool, resume: bool) -> Owned | None:
    """The list at an address that a run may use. Raises ConfigError where it holds an earlier run (without `resume` or `overwrite`), or objects
    of somebody else's under the names a run would write; StorageError."""
    owned = read(store)
    there = store.there([name.rstrip("/") for name in ownership.LAYOUT[KIND] if name != "*"])
    if owned is None and {"trials.csv", "config.resolved.yaml"} <= there:
        raise ConfigError(
            f"output.dir {store.shown!r} holds a run of an earlier version of safebasin, without the list of what it made ({MARKER}), so nothing in "
            "it is touched; give another output.dir, or finish the run with the version that began it"
        )
    if owned is not None and there & {"trials.csv", "config.resolved.yaml"} and not (overwrite or resume):
        raise ConfigError(
            f"output.dir {store.shown!r} holds an earlier run; go on with it (`safebasin resume`), give another output.dir, or "
            "output.overwrite=true to remove what that run made"
        )
    made = {name.split("/")[0] for name in owned.made} if owned is not None else set()
    foreign = sorted(there - made)
    if foreign:
        raise ConfigError(
            f"output.dir {store.shown!r} holds {', '.join(foreign[:6])}, which this run would write and which no run listed in {MARKER} made; "
            "move it away, or give another output.dir"
        )
    return owned


class Objects:
    """The list at an address while a run writes it; the mirror's thread alone calls it, but for what is said."""

    def __init__(self, store: Store, quick: Store):
        self._store, self._quick = store, quick
        self.owned = read(store) or Owned(Path(), KIND, uuid.uuid4().hex)
        self.foreign: set[str] = set()
        self._listed = store.read(MARKER) is not None

    def claim(self, names: Iterable[str], folders: Iterable[str]) -> None:
        """Put names on the list, before they are sent; those that are there and are not on it are somebody else's. Raises StorageError."""
        made = self.owned.made
        new = {name for name in names if name not in made and name not in self.foreign and not self.owned.owns(name)}
        there = self._quick.there(sorted(new)) if new else set()
        for name in sorted(there):
            log.warning("%s/%s was not made by this run and is not replaced; move it, then `safebasin resume` sends ours", self._store.shown, name)
        self.foreign |= there
        new = (new - there) | (set(folders) - made)
        if new or not self._listed:
            self._quick.write(MARKER, Owned(Path(), KIND, self.owned.id, made | new).body())
            made |= new
            self._listed = True

    def delete(self, name: str) -> None:
        """Delete an object, or what is ours below a folder. Raises StorageError."""
        delete(self._quick, self.owned, name)


def delete(store: Store, owned: Owned, name: str) -> None:
    """Delete an object, or a folder's, as far as they are on the list. Raises StorageError."""
    if owned.owns(name):
        store.delete_file(name)
    for key in store.list(name):
        if owned.owns(key):
            store.delete_file(key)
    store.delete_if_empty(name)


def empty(store: Store) -> None:
    """Delete what an earlier run made; the list, shortened to what is left of it, last. Raises StorageError."""
    owned = read(store)
    if owned is None:
        return
    for name in sorted({made.split("/")[0] for made in owned.made}):
        delete(store, owned, name)
    store.delete_file(MARKER)
