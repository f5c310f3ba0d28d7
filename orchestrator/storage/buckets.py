"""The only door to object storage: files and folders below an address, through pyarrow.fs.

Every call is tried again for `patience` seconds while the store does not answer, then raises StorageError with the remedy. A file
appears whole or not at all. Credentials come from the environment (AWS_ACCESS_KEY_ID, ...), never from the address.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.errors import ConfigError, StorageError
from orchestrator.storage import addresses

T = TypeVar("T")
CHUNK = 16 << 20
PATIENCE = 60.0
"""Seconds a store that does not answer is asked again."""
_OBJECT_STORES = {"s3", "gcs", "abfs"}
"""Where an object is seen when it is complete; elsewhere a file is written under another name first."""
_PARTIAL = ".partial-"
_REMEDIES = {
    r"NO_SUCH_BUCKET|bucket does not exist|container does not exist": "make the bucket, or correct output.dir",
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE|EXPIRED_TOKEN|UNRECOGNIZED_CLIENT|HTTP response code (401|403)|Permission": (
        "export credentials that may read, write, list and delete there (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3) on every node"
    ),
    r"PERMANENT_REDIRECT|HTTP response code 301|AuthorizationHeaderMalformed": "give the bucket's region (?region=..., or AWS_REGION)",
}
"""What no further try would mend -> what to do."""


def open(address: str, *, patience: float = PATIENCE, field: str = "output.dir") -> Store:
    """The store below an address. Raises ConfigError, naming `field`, where pyarrow cannot take it; reaches no network for most schemes."""
    try:
        checked = addresses.checked(address)
    except ValueError as error:
        raise ConfigError(f"{field}={addresses.masked(address)}: {error}") from None
    from pyarrow import fs

    if checked.startswith("s3://") and "allow_delayed_open" not in checked:  # one request instead of three for a small object
        checked += ("&" if "?" in checked else "?") + "allow_delayed_open=true"
    try:
        system, root = fs.FileSystem.from_uri(checked)
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise ConfigError(
            f"{field}={addresses.masked(address)} cannot be opened: {_first_line(error)}; correct the address, or give a folder"
        ) from None
    return Store(system, root, addresses.masked(address), patience)


class Store:
    """Files below `root` of a pyarrow filesystem; names are relative, with slashes. Thread-safe as the filesystem is."""

    def __init__(self, system: Any, root: str, shown: str, patience: float = PATIENCE):
        self.fs, self.root, self.shown, self.patience = system, root.rstrip("/"), shown, patience

    def check(self) -> None:
        """Write, read and delete a small object. Raises StorageError; there is one more try at most, so that a typing error is told soon."""
        name, quick = f".probe-{uuid.uuid4().hex[:12]}", Store(self.fs, self.root, self.shown, min(self.patience, 5.0))
        made = self._missing_folders()
        quick.write(name, b"safebasin")
        if quick.read(name) != b"safebasin":
            raise StorageError(f"{self.shown} does not hold what was just written there; is it cached or versioned by something in between?")
        quick.delete(name)
        for folder in made:  # looking leaves nothing behind
            with contextlib.suppress(OSError):
                os.rmdir(folder)

    def _missing_folders(self) -> list[str]:
        """Folders that a first file would make, the innermost first; of a store that is a file system of this machine."""
        if self.fs.type_name != "local":
            return []
        return [str(path) for path in (Path(self.root), *Path(self.root).parents) if not path.exists()]

    # -- files -------------------------------------------------------------------------------------------------------

    def read(self, name: str) -> bytes | None:
        """A file's content; None where there is none."""

        def attempt() -> bytes | None:
            try:
                with self.fs.open_input_stream(self._path(name)) as file:
                    return file.read()
            except FileNotFoundError:
                return None

        return self._tried(f"read {name}", attempt)

    def write(self, name: str, data: bytes) -> None:
        """Replace a file."""
        self._tried(f"write {name}", lambda: self._replace(name, lambda target: target.write(data)))

    def put(self, path: Path, name: str) -> None:
        """Upload a file. Raises StorageError where it cannot be read, too."""

        def copy(target: Any) -> None:
            with path.open("rb") as source:
                shutil.copyfileobj(source, target, CHUNK)

        self._tried(f"write {name}", lambda: self._replace(name, copy))

    def get(self, name: str, path: Path) -> bool:
        """Download a file to `path`, whole or not at all; False where there is none."""

        def attempt() -> bool:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
            try:
                with os.fdopen(handle, "wb") as target, self.fs.open_input_stream(self._path(name)) as source:
                    shutil.copyfileobj(source, target, CHUNK)
                os.replace(temporary, path)
            except FileNotFoundError:
                return False
            finally:
                Path(temporary).unlink(missing_ok=True)
            return True

        return self._tried(f"read {name}", attempt)

    def list(self, name: str = "") -> dict[str, int]:
        """{name: bytes} of every file below; empty where there is nothing."""
        from pyarrow.fs import FileSelector

        def attempt() -> dict[str, int]:
            found = self.fs.get_file_info(FileSelector(self._path(name), recursive=True, allow_not_found=True))
            sizes = {info.path.lstrip("/").removeprefix(self.root.lstrip("/")).lstrip("/"): info.size for info in found if info.is_file}
            return {_inside(key, self.shown): size for key, size in sorted(sizes.items()) if not key.rpartition("/")[2].startswith(_PARTIAL)}

        return self._tried(f"list {name or 'the files'}", attempt)

    def exists(self, name: str) -> bool:
        """Whether a file of this name is there."""
        return self._tried(f"look for {name}", lambda: self.fs.get_file_info(self._path(name)).is_file)

    def there(self, names: Sequence[str]) -> set[str]:
        """Those of the names that a file or a folder has."""
        from pyarrow.fs import FileType

        def attempt() -> set[str]:
            found = self.fs.get_file_info([self._path(name) for name in names])
            return {name for name, info in zip(names, found, strict=True) if info.type != FileType.NotFound}

        return self._tried("look for files", attempt)

    def delete_file(self, name: str) -> None:
        """Remove a file; none there, or a folder, is no error."""

        def attempt() -> None:
            with contextlib.suppress(FileNotFoundError):
                if self.fs.get_file_info(self._path(name)).is_file:
                    self.fs.delete_file(self._path(name))

        self._tried(f"delete {name}", attempt)

    def delete_if_empty(self, name: str) -> None:
        """Remove a folder, and those in it, where there are no files in them. Object stores have none."""
        from pyarrow.fs import FileType

        def attempt() -> None:
            with contextlib.suppress(FileNotFoundError):
                if self.fs.get_file_info(self._path(name)).type == FileType.Directory and not self.list(name):
                    self.fs.delete_dir(self._path(name))

        self._tried(f"delete {name}", attempt)

    def delete(self, name: str) -> None:
        """Remove a file, or a folder with everything in it; nothing there is no error."""
        from pyarrow.fs import FileType

        def attempt() -> None:
            path = self._path(name)
            with contextlib.suppress(FileNotFoundError):
                kind = self.fs.get_file_info(path).type
                if kind == FileType.Directory:
                    self.fs.delete_dir(path)
                elif kind == FileType.File:
                    self.fs.delete_file(path)

        self._tried(f"delete {name}", attempt)

    # -- folders -----------------------------------------------------------------------------------------------------

    def put_folder(self, folder: Path, name: str, *, last: str | None = None) -> None:
        """Upload every file below `folder` (but hidden ones), the one called `last` after all others, so that its being there says the rest is."""
        paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
        for path in sorted(paths, key=lambda path: (path.name == last, path)):
            self.put(path, f"{name}/{path.relative_to(folder).as_posix()}")

    def get_folder(self, name: str, folder: Path) -> bool:
        """Download every file below `name`; those that are there in the same size are taken as they are. False where there is none."""
        found = self.list(name)
        for key, size in found.items():
            path = folder / key.removeprefix(f"{name}/")
            if not (path.is_file() and path.stat().st_size == size):
                self.get(key, path)
        return bool(found)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _replace(self, name: str, write: Callable[[Any], Any]) -> None:
        path = self._path(name)
        parent, _, base = path.rpartition("/")
        if self.fs.type_name in _OBJECT_STORES:
            with self.fs.open_output_stream(path) as target:
                write(target)
            return
        temporary = f"{parent}/{_PARTIAL}{uuid.uuid4().hex[:8]}-{base}"
        self.fs.create_dir(parent, recursive=True)
        try:
            with self.fs.open_output_stream(temporary) as target:
                write(target)
            self.fs.move(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                self.fs.delete_file(temporary)
            raise

    def _tried(self, what: str, call: Callable[[], T]) -> T:
        from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

        def again(error: BaseException) -> bool:
            return isinstance(error, OSError) and not isinstance(error, (PermissionError, FileNotFoundError)) and _final(error) is None

        try:
            return Retrying(
                retry=retry_if_exception(again), stop=stop_after_delay(self.patience), wait=wait_random_exponential(0.2, max=10), reraise=True
            )(call)
        except OSError as error:
            remedy = _final(error) or "check the network and the address (endpoint, region), or give a folder"
            raise StorageError(f"cannot {what} in {self.shown}: {_first_line(error)}; {remedy}") from error


def _inside(name: str, shown: str) -> str:
    """A name that stays below any folder it is put in. Raises StorageError for another, which somebody planted."""
    if any(part in ("..", "") for part in name.split("/")) or "\\" in name:
        raise StorageError(f"{shown} holds an object named {name!r}, which would be written outside of its folder and is none of ours; remove it")
    return name


def _final(error: OSError) -> str | None:
    """What to do about an error that no further try would mend; None for any other."""
    return next((remedy for pattern, remedy in _REMEDIES.items() if re.search(pattern, str(error))), None)


def _first_line(error: BaseException) -> str:
    """The reason in one line, without request ids and with masked addresses."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    text = re.sub(r"\s*\(Request ID: [^)]*\)|; Details: .*", "", text)
    return re.sub(r"\w+://\S+", lambda found: addresses.masked(found.group()), text)[:300]
