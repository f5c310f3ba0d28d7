"""What safebasin owns in a folder: what the marker lists that it wrote there itself, and nothing else.

A marker (`.safebasin.json` of a run, `.safebasin.<kind>.json` of other commands) holds a format, the kind, an id and the names that were
made. A name is put on the list before it is made, and only where nothing of that name was there; only what is listed is ever replaced or
deleted. Inside folders that hold workers' files (`trials/`, `trained/`, `ray/`) a file is ours by its listed folder and its form (`SHAPES`).
A marker is a file on somebody's disk: one that is damaged, or names what we never make, owns nothing. Links are never followed. A run's marker
also says which folder it was written in and when the run ended, so that a copy, and files changed since, are told from it (`ownership_checks`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import threading
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.errors import ConfigError, StorageError
from orchestrator.storage import atomic, folder_stamps, nofollow
from orchestrator.storage.ownership_names import ADDRESS_SHAPES, LAYOUT, LINKS, MODEL, SHAPES, WORKERS, known, marker_name

__all__ = ["LAYOUT", "NotOurs", "Owned", "active", "claim", "current", "known", "marker_name", "opened", "parse", "read", "remove"]

FORMAT = 1
MAKER = "safebasin"
MOST_BYTES = 32 << 20

_active: dict[str, Owned] = {}
_lock = threading.RLock()


@dataclass
class Owned:
    """The list of one command in one folder. Thread-safe; one process writes it at a time."""

    folder: Path
    kind: str
    id: str
    made: set[str] = field(default_factory=set)
    """Names relative to the folder, with slashes; a folder's ends in one."""
    place: dict[str, int] | None = None
    """Of a run: which folder it was written in (`folder_stamps.place_of`); None: by an earlier version."""
    ended: int | None = None
    """Of a run: when its last driver ended, in ns of the folder's clock; None while one lives, and where it was killed."""
    since: int | None = None
    """When the list, come with a copy of its folder, was taken up here; what is older was not made here."""
    changed: set[str] = field(default_factory=set)
    """Names of ours that somebody changed after a run had ended; theirs until the run writes them anew."""
    written: int = 0
    """When the marker that this was read from was written, in ns."""
    running: bool = False
    taken_up: bool = False

    def claim(self, name: str, *, folder: bool = False) -> None:
        """Put a name, and the folders it lies in, on the list. Nothing happens where it is ours already.

        Raises StorageError where something of that name is there that is not ours, and where the marker cannot be written.
        """
        parts = name.strip("/").split("/")
        below = ["/".join(parts[: i + 1]) + "/" for i in range(len(parts) - 1)] + ["/".join(parts) + ("/" if folder else "")]
        with _lock:
            new = []
            for wanted in below:
                if wanted not in LINKS and (self.folder / wanted.rstrip("/")).is_symlink():
                    raise self._foreign(wanted, "is a link, which is not followed")
                if self.owns(wanted) or wanted.endswith("/") and self.shared(wanted):
                    continue
                if os.path.lexists(self.folder / wanted.rstrip("/")):
                    raise self._foreign(wanted, "is there and was not made by it")
                if not known(self.kind, wanted):
                    raise ValueError(f"{wanted} is no name that a {self.kind} makes; add it to ownership.LAYOUT")
                new.append(wanted)
            anew = self.changed & set(below)  # the run writes them now
            if new or anew:
                self.made.update(new)
                self.changed -= anew
                try:
                    self.save()
                except BaseException:
                    self.made.difference_update(new)
                    self.changed |= anew
                    raise

    def _foreign(self, name: str, why: str) -> StorageError:
        what = "this run" if self.kind in ("run", "mirror") else f"safebasin's {self.kind}"
        shown = self.folder / name.rstrip("/")
        return StorageError(f"cannot write {shown}: it {why}, and {what} replaces only what it made itself; move it away, or give another folder")

    def shared(self, name: str) -> bool:
        """Whether another command of ours made this folder (`plots/` of an evaluation and a basin in one folder)."""
        if not (self.folder / name).is_dir():
            return False
        for other in {marker_name(kind): kind for kind in LAYOUT if kind != "mirror"}.values():
            with contextlib.suppress(NotOurs):
                found = read(self.folder, other)
                if found is not None and found.owns(name):
                    return True
        return False

    def owns(self, name: str) -> bool:
        """Whether a name (a folder's ends in a slash) is on the list, or lies in a folder on it and has a form of ours."""
        if name in self.made:
            return True
        for shape in {"run": SHAPES, "mirror": ADDRESS_SHAPES}.get(self.kind, ()):
            match = shape.fullmatch(name)
            if match and match.group(1) in self.made and ".." not in name.split("/"):
                return True
        return False

    def remove(self, name: str) -> bool:
        """Delete a file or folder as far as it is ours; whether nothing of that name is left. Raises StorageError."""
        name = name.strip("/")
        parts = name.split("/")
        with _lock, contextlib.ExitStack() as stack:
            try:
                with contextlib.suppress(FileNotFoundError):  # gone already; the list is put right below
                    where = nofollow.opened(self.folder, stack)
                    for part in parts[:-1]:
                        where = nofollow.entered(part, where, stack)
                    self._delete(name, parts[-1], where)
            except NotADirectoryError:
                return False  # a folder above it became a link or a file of somebody's
            except OSError as error:
                raise _cannot(self.folder / name, error) from error
            left = os.path.lexists(self.folder / name)
            if not left:
                self._forget(name)
            return not left

    def _delete(self, name: str, last: str, where: int) -> None:
        state = os.stat(last, dir_fd=where, follow_symlinks=False)
        if not stat.S_ISDIR(state.st_mode):
            if self.file_is_ours(name, state.st_mode) and self._proven(name, state):
                os.unlink(last, dir_fd=where)
            return
        if not self.owns(f"{name}/"):
            return
        nested = read(self.folder / name, "model") if last == MODEL.rstrip("/") else None
        if nested is not None:
            nested.changed = {one.removeprefix(f"{name}/") for one in self.changed if one.startswith(f"{name}/")}
        with contextlib.ExitStack() as stack:
            inner = nofollow.entered(last, where, stack)
            for entry in sorted(os.listdir(inner)):
                with contextlib.suppress(FileNotFoundError):
                    if nested is None:
                        self._delete(f"{name}/{entry}", entry, inner)
                    elif entry != marker_name("model"):
                        nested._delete(entry, entry, inner)
            if nested is not None and os.listdir(inner) == [marker_name("model")]:
                os.unlink(marker_name("model"), dir_fd=inner)
            empty = not os.listdir(inner)
        if empty:
            os.rmdir(last, dir_fd=where)
        elif nested is not None:
            nested.prune()

    def _proven(self, name: str, state: os.stat_result) -> bool:
        """Whether a file whose name is ours is the one we made: not changed by somebody, and no file of a worker's that came with a copy."""
        copied = self.since is not None and max(state.st_mtime_ns, state.st_ctime_ns) < self.since
        return name not in self.changed and (not copied or name in self.made or name.startswith(".model.partial/"))

    def file_is_ours(self, name: str, mode: int) -> bool:
        """By its name and form. A link is never ours, but for Ray's and the journal's lock, which is one."""
        if stat.S_ISLNK(mode):
            return (name.startswith("ray/") and self.owns(name)) or bool(re.fullmatch(r"study\.journal\.lock", name) and self.owns(name))
        if self.owns(name):
            return True
        for side in ("-wal", "-shm", "-journal"):  # SQLite's
            if name.endswith(side) and name.removesuffix(side) in self.made:
                return True
        aside = re.fullmatch(r"(.+)\.(?:damaged|unreadable)-\d+", name)
        if aside is not None and self.owns(aside[1]):
            return True
        found = re.fullmatch(r"(.*/)?\.([^/]+)\.[a-z0-9_]{8}\.tmp", name)  # a write of ours that was killed
        return found is not None and self.owns(f"{found[1] or ''}{found[2]}")

    def _forget(self, name: str) -> None:
        gone = {made for made in self.made if made.rstrip("/") == name or made.startswith(f"{name}/")}
        if gone:
            self.made -= gone
            self.save()

    def empty(self, keep: Iterable[str] = ()) -> list[str]:
        """Delete everything that is ours, but for `keep`; names at the top that stay because they hold something that is not. Raises StorageError."""
        tops = sorted({made.split("/")[0] for made in self.made} - set(keep))
        stays = [name for name in tops if not self.remove(name)]
        self._sweep_killed_writes()
        return stays

    def close_empty(self) -> None:
        """Remove the folder where nothing is left in it but its list."""
        if os.listdir(self.folder) == [marker_name(self.kind)]:
            os.unlink(self.folder / marker_name(self.kind))
            os.rmdir(self.folder)

    def _sweep_killed_writes(self) -> None:
        for path in self.folder.glob(".*.tmp"):
            if path.is_file() and not path.is_symlink() and re.fullmatch(rf"\.{re.escape(marker_name(self.kind))}\.[a-z0-9_]{{8}}\.tmp", path.name):
                path.unlink(missing_ok=True)

    def _adopt(self) -> None:
        """List the folders that workers of ours made here, whose driver was elsewhere: the copy of an address has a name that nobody else uses."""
        tops = [self.folder / name for name in WORKERS]
        places = [path for top in tops for path in (top, *(top.glob("*") if top.name == "trials" else ()))]
        found = {path.relative_to(self.folder).as_posix() + "/" for path in places if path.is_dir() and not path.is_symlink()}
        if found - self.made:
            self.made |= found
            self.save()

    def prune(self) -> None:
        """Take off the list what is not there: what comes to be under such a name is somebody else's."""
        with _lock:
            gone = {made for made in self.made if not os.path.lexists(self.folder / made.rstrip("/"))}
            back = {name for name in self.changed if not os.path.lexists(self.folder / name)}
            if gone or back:
                self.made -= gone
                self.changed -= back
                self.save()

    def end(self) -> None:
        """Note that the run has ended: what is changed from now on is changed by somebody else. Raises StorageError."""
        try:
            self.ended, self.running = folder_stamps.now(self.folder), False
        except OSError as error:
            raise _cannot(self.folder, error) from error
        self.save()

    def body(self) -> bytes:
        content: dict[str, object] = {"made_by": MAKER, "format": FORMAT, "kind": self.kind, "id": self.id, "made": sorted(self.made)}
        if self.kind == "run":
            content |= {"place": self.place, "ended": self.ended, "since": self.since, "changed": sorted(self.changed)}
        return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogateescape")

    def save(self, *, first: bool = False) -> None:
        """Write the marker anew, or for the `first` time. Raises StorageError."""
        path = self.folder / marker_name(self.kind)
        try:
            atomic.replace(path, self.body(), 0o644, first=first, durable=True)
        except OSError as error:
            raise _cannot(path, error) from error


class NotOurs(ConfigError):
    """A marker that is damaged or was not written by us."""


def _cannot(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error.strerror or error}; check its folder's permissions and disk, or give another folder")


def parse(data: bytes, folder: Path, kind: str, where: str) -> Owned:
    """The list in a marker's bytes. Raises NotOurs, naming `where`, for anything that we would not have written."""

    def refuse(why: str) -> NotOurs:
        return NotOurs(f"{where} is damaged or was not written by safebasin ({why}), so nothing there is taken for ours; move it away, or give another folder")  # fmt: skip  # noqa: E501

    try:
        body = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise refuse("it is no JSON") from None
    if not isinstance(body, dict) or body.get("made_by") != MAKER:
        raise refuse("it does not say made_by: safebasin")
    if body.get("format") != FORMAT:
        raise refuse(f"its format is {str(body.get('format'))[:20]!r}, this version writes {FORMAT}")
    if body.get("kind") != kind:
        raise refuse(f"it is of a {str(body.get('kind'))[:20]!r}, not of a {kind!r}")
    made = body.get("made")
    if not isinstance(body.get("id"), str) or not re.fullmatch(r"[0-9a-f]{32}", body["id"]) or not isinstance(made, list):
        raise refuse("its id or its list is none")
    for name in made:
        if not isinstance(name, str) or not _inside(name) or not known(kind, name):
            raise refuse(f"it lists {str(name)[:60]!r}, which a {kind} never makes")
    place, ended, since, changed = body.get("place"), body.get("ended"), body.get("since"), body.get("changed", [])
    if place is not None and not (isinstance(place, dict) and {"device", "inode", "filesystem"} <= set(place) and all(map(_whole, place.values()))):
        raise refuse("its place is none")
    if any(moment is not None and not _whole(moment) for moment in (ended, since)):
        raise refuse("its moments are none")
    if not isinstance(changed, list) or not all(isinstance(name, str) and _inside(name) for name in changed):
        raise refuse("what it says was changed is no list of names")
    return Owned(folder, kind, body["id"], set(made), place, ended, since, set(changed))


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _inside(name: str) -> bool:
    parts = name.removesuffix("/").split("/")
    return bool(name) and not any(part in ("", ".", "..") for part in parts) and not any(c in name for c in "\\\0")


def read(folder: Path, kind: str) -> Owned | None:
    """The list of a kind in a folder; None where there is no marker. Raises NotOurs for one that we did not write, StorageError."""
    path = folder / marker_name(kind)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if path.is_symlink():
            raise NotOurs(f"{path} is a link, which safebasin never makes; move it away, or give another folder") from None
        raise StorageError(f"cannot read {path}: {error.strerror or error}; mend it, or give another folder") from error
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, handle)
        found = os.fstat(handle)  # before it is a file of Python's, which a folder cannot be
        if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES:
            raise NotOurs(f"{path} is no file that safebasin writes; move it away, or give another folder")
        with os.fdopen(handle, "rb", closefd=False) as file:
            owned = parse(file.read(), folder, kind, str(path))
    owned.written = found.st_mtime_ns
    return owned


def opened(folder: Path, kind: str) -> Owned:
    """The list of a kind in a folder, begun where there is none; the folder is made. Raises NotOurs, StorageError."""
    with _lock:
        here = _active.get(os.path.abspath(folder))
        if here is not None and here.kind == kind:
            return here
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot(folder, error) from error
        found = read(folder, kind)
        if found is None:
            found = Owned(folder, kind, uuid.uuid4().hex, place=folder_stamps.place_of(folder) if kind == "run" else None)
            found.save(first=True)
        else:
            found.prune()
        if kind == "mirror":
            found._adopt()
        return found


@contextlib.contextmanager
def active(folder: Path, kind: str) -> Iterator[Owned]:
    """While inside, whatever this process writes below the folder through `outputs` is put on the folder's list first."""
    key = os.path.abspath(folder)
    before = _active.get(key)
    owned = before if before is not None and before.kind == kind else opened(Path(key), kind)
    _active[key] = owned
    try:
        yield owned
        if before is None and owned.running:  # a driver that failed may have left workers that still write
            owned.end()
    finally:
        if before is None:
            _active.pop(key, None)
        else:
            _active[key] = before


def current(folder: Path) -> Owned | None:
    """The list that is `active` in a folder."""
    return _active.get(os.path.abspath(folder))


def claim(path: str | Path, *, folder: bool = False) -> None:
    """Put a path on the list of the folder that is `active` here, if it lies in one; before it is made. Raises StorageError as `Owned.claim`."""
    found = _owner(path)
    if found is not None:
        found[0].claim(found[1], folder=folder)


def remove(path: str | Path) -> bool:
    """Delete a path as far as it is ours, by the list that is `active` here or the run's marker above it; whether nothing is left of it."""
    found = _owner(path) or _on_disk(Path(path))
    if found is None:
        return not os.path.lexists(path)
    return found[0].remove(found[1])


def _owner(path: str | Path) -> tuple[Owned, str] | None:
    """(the innermost active list, the name in it)."""
    whole = os.path.abspath(path)
    parent = os.path.dirname(whole)
    while _active:
        if parent in _active:
            return _active[parent], os.path.relpath(whole, parent).replace(os.sep, "/")
        above = os.path.dirname(parent)
        if above == parent:
            return None
        parent = above
    return None


def _on_disk(path: Path) -> tuple[Owned, str] | None:
    whole = Path(os.path.abspath(path))
    for parent in whole.parents:
        for kind in ("run", "mirror"):
            with contextlib.suppress(NotOurs):
                owned = read(parent, kind)
                if owned is not None:
                    return owned, whole.relative_to(parent).as_posix()
    return None
