"""What safebasin owns in a folder: what the marker lists that it wrote there itself, and nothing else.

A marker (`.safebasin.json` of a run, `.safebasin.<kind>.json` of other commands) holds a format, the kind, an id and the names that were
made. A name is put on the list before it is made, and only where nothing of that name was there; only what is listed is ever replaced or
deleted. Inside folders that hold workers' files (`trials/`, `trained/`, `ray/`) a file is ours by its listed folder and its form (`SHAPES`).
A marker is a file on somebody's disk: one that is damaged, or names what we never make, owns nothing. Links are never followed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator import nofollow
from orchestrator.errors import ConfigError, StorageError
from orchestrator.ownership_names import ADDRESS_SHAPES, LAYOUT, MODEL, SHAPES, WORKERS, known, marker_name

__all__ = ["LAYOUT", "NotOurs", "Owned", "active", "claim", "collisions", "known", "marker_name", "opened", "parse", "read", "remove", "sealed"]

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

    def claim(self, name: str, *, folder: bool = False) -> None:
        """Put a name, and the folders it lies in, on the list. Nothing happens where it is ours already.

        Raises StorageError where something of that name is there that is not ours, and where the marker cannot be written.
        """
        parts = name.strip("/").split("/")
        below = ["/".join(parts[: i + 1]) + "/" for i in range(len(parts) - 1)] + ["/".join(parts) + ("/" if folder else "")]
        with _lock:
            new = []
            for wanted in below:
                if self.owns(wanted):
                    if wanted in self.made and not wanted.endswith("/") and (self.folder / wanted).is_symlink():
                        raise self._foreign(wanted, "became a link")
                    continue
                if wanted.endswith("/") and self._shared(wanted):
                    continue
                if os.path.lexists(self.folder / wanted.rstrip("/")):
                    raise self._foreign(wanted, "is there and was not made by it")
                if not known(self.kind, wanted):
                    raise ValueError(f"{wanted} is no name that a {self.kind} makes; add it to ownership.LAYOUT")
                new.append(wanted)
            if new:
                self.made.update(new)
                try:
                    self._write()
                except BaseException:
                    self.made.difference_update(new)
                    raise

    def _foreign(self, name: str, why: str) -> StorageError:
        what = "this run" if self.kind in ("run", "mirror") else f"safebasin's {self.kind}"
        shown = self.folder / name.rstrip("/")
        return StorageError(f"cannot write {shown}: it {why}, and {what} replaces only what it made itself; move it away, or give another folder")

    def _shared(self, name: str) -> bool:
        """Whether another command of ours made this folder (`plots/` of an evaluation and a basin in one folder)."""
        if not (self.folder / name).is_dir():
            return False
        for other in {marker_name(kind): kind for kind in LAYOUT if kind != "mirror"}.values():
            with contextlib.suppress(NotOurs):
                found = read(self.folder, other)
                if found is not None and found.owns(name):
                    return True
        return False

    def _is_foreign(self, name: str) -> bool:
        """Whether a name at the top that is there is somebody else's."""
        path = self.folder / name.rstrip("/")
        if name in self.made and name == MODEL and any(path.iterdir() if path.is_dir() else (None,)):
            return path.is_symlink() or read(path, "model") is None
        if self.kind == "mirror" and name in WORKERS and path.is_dir() and not path.is_symlink():
            return False
        return name not in self.made and not (name.endswith("/") and self._shared(name))

    def links(self) -> list[str]:
        """Names at the top that were made and are links now: somebody moved what they point to. Sorted."""
        tops = {made.split("/")[0] for made in self.made} - {"study.journal.lock"}
        return sorted(name for name in tops if (self.folder / name).is_symlink())

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
        mode = os.stat(last, dir_fd=where, follow_symlinks=False).st_mode
        if not stat.S_ISDIR(mode):
            if self._file_is_ours(name, mode):
                os.unlink(last, dir_fd=where)
            return
        if not self.owns(f"{name}/"):
            return
        nested = read(self.folder / name, "model") if last == MODEL.rstrip("/") else None
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

    def _file_is_ours(self, name: str, mode: int) -> bool:
        """A link is never ours, but for Ray's and the journal's lock, which is one."""
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
            self._write()

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
            self._write()

    def prune(self) -> None:
        """Take off the list what is not there: what comes to be under such a name is somebody else's."""
        with _lock:
            gone = {made for made in self.made if not os.path.lexists(self.folder / made.rstrip("/"))}
            if gone:
                self.made -= gone
                self._write()

    def body(self) -> bytes:
        content = {"made_by": MAKER, "format": FORMAT, "kind": self.kind, "id": self.id, "made": sorted(self.made)}
        return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogateescape")

    def _write(self, *, first: bool = False) -> None:
        path = self.folder / marker_name(self.kind)
        try:
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=f".{path.name}.", suffix=".tmp")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(self.body())
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(temporary, 0o644)
                if first:
                    os.link(temporary, path)  # fails where another process was faster
                else:
                    os.replace(temporary, path)
            finally:
                Path(temporary).unlink(missing_ok=True)
            handle = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
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
    return Owned(folder, kind, body["id"], set(made))


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
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES:
            raise NotOurs(f"{path} is no file that safebasin writes; move it away, or give another folder")
        return parse(file.read(), folder, kind, str(path))


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
    Owned(folder, kind, uuid.uuid5(uuid.NAMESPACE_OID, "\n".join(sorted(made))).hex, made)._write()  # the same model gives the same files
    return sorted(name for name in made if not name.endswith("/"))


def collisions(folder: Path, kind: str, owned: Owned | None) -> list[str]:
    """Names that a command of this kind would make and that are there, but are not on its list. Sorted."""
    list_ = owned or Owned(folder, kind, "")
    return sorted(name.rstrip("/") for name in LAYOUT[kind] if name != "*" and os.path.lexists(folder / name.rstrip("/")) and list_._is_foreign(name))


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
            found = Owned(folder, kind, uuid.uuid4().hex)
            found._write(first=True)
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
    finally:
        if before is None:
            _active.pop(key, None)
        else:
            _active[key] = before


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
