"""Folders that no command may take for its files: here and above, a home, a git work tree, the system's and Python's own, what another command
of ours made, one that holds or lies in what is read.

Paths are compared as the disk knows them (links resolved, then by device and inode), so that no other spelling of a folder gets by.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from orchestrator.config import Experiment
from orchestrator.errors import ConfigError, StorageError
from orchestrator.storage import cachedir, ownership, ownership_checks
from orchestrator.storage.ownership import NotOurs

Input = tuple[str, Path]
"""(what it is, e.g. "task.data"; where it lies)."""
SYSTEM = ("etc", "usr", "bin", "sbin", "boot", "proc", "sys", "dev", "lib", "lib32", "lib64", "libx32")
PYTHON = ("bin", "lib", "lib64", "include", "share", "Lib", "Scripts", "conda-meta", "pkgs", "envs")
"""Folders of a Python installation; beside them, where somebody made an environment in the project's own folder, lie other files."""
SECRETS = (".ssh", ".gnupg", ".aws", ".kube")
_SOURCES = (
    ("model", ("model_name_or_path", "unaligned_name_or_path", "chat_template")), ("task", ("data", "eval_data")),
    ("safety", ("data", "harmful_data")),
)  # fmt: skip


def inputs(experiment: Experiment) -> list[Input]:
    """Every path on this disk that the experiment reads: models, data, template, config, DeepSpeed's file. What is no path is left out."""
    named = [(f"{section}.{key}", getattr(getattr(experiment, section), key)) for section, keys in _SOURCES for key in keys]
    for i, suite in enumerate(experiment.safety.suites):
        named += [(f"safety.suites.{i}.data", suite.data), (f"safety.suites.{i}.local", suite.local)]
    found = [(what, path) for what, text in named if text and (path := local(text)) is not None]
    return found + [("the config", path) for path in experiment.origin if _there(path)]


def local(text: str) -> Path | None:
    """The file or folder that a text names, the embedded world's among them; None where there is none, as for a hub id or a template's text."""
    if text == "pocket" or text.startswith("pocket:"):
        path = cachedir.root() / "pocket"
    elif "\n" in text or "\0" in text or len(text) > 4000:
        return None
    else:
        path = Path(os.path.expanduser(text.removeprefix("file://")))
    return path if _there(path) else None


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a text that is too long for a name
        return False


def check(folder: str | Path, inputs: Sequence[Input] = (), *, field: str = "output.dir") -> None:
    """Refuse a folder that files of ours do not belong in. Looks only. Raises ConfigError, naming `field`, the folder and why."""
    remedy = "give a folder of its own, e.g. " + ("output.dir=outputs/NAME" if field == "output.dir" else f"{field} outputs/NAME")
    shown = f"{field} {str(folder)!r}"
    try:
        if os.path.lexists(folder) and not os.path.exists(folder):
            raise ConfigError(f"{shown} is a link to nothing; make the folder it points to, or give another")
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise ConfigError(f"{shown} is a file; give a folder")
        place = Path(os.path.realpath(folder))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{shown} cannot be a folder ({error}); give another") from error
    why = _reason(place)
    if why is not None:
        raise ConfigError(f"{shown} {why}, where a run could take other files for its own; {remedy}")
    for what, path in inputs:
        target = Path(os.path.realpath(path))
        if _holds(place, target):
            raise ConfigError(f"{shown} holds {what} ({path}), which is in use; {remedy}")
        if target.is_dir() and _holds(target, place):
            raise ConfigError(f"{shown} lies in {what} ({path}), which is in use; {remedy}")


def _reason(place: Path) -> str | None:
    if place.parent == place:
        return "is the root of the file system"
    here = Path(os.path.realpath(Path.cwd()))
    if _same(place, here):
        return "is the folder you are in"
    if _holds(place, here):
        return "lies above the folder you are in"
    for home in _homes():
        if _same(place, home):
            return "is a home folder"
        if _holds(place, home):
            return f"lies above the home folder {home}"
    if any(os.path.lexists(place / name) for name in (".ssh", ".bashrc", ".profile", ".zshrc")):
        return "is a home folder"
    if any(os.path.lexists(place / name) for name in (".git", ".hg", ".svn")):
        return "is the root of a version-controlled work tree"
    if ".git" in place.parts or all(os.path.lexists(place / name) for name in ("HEAD", "objects", "refs")):
        return "lies in a git repository's own files"
    return _of_the_system(place) or _of_another(place)


def _of_the_system(place: Path) -> str | None:
    """Why a folder is the system's, Python's or a secret one's; None where it is none."""
    top = place.parts[1] if len(place.parts) > 1 else ""
    if top in SYSTEM and place.parts[:3] != ("/", "dev", "shm"):
        return f"lies in the system's own /{top}"
    package = Path(__file__).resolve().parents[1]
    for own in (package, *(package.parent / name for name in ("strategies", "search_spaces"))):
        if _holds(own, place):
            return f"lies in safebasin's own code ({own})"
    for prefix in {os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix)} - {"/"}:
        if _same(Path(prefix), place) or any(_holds(Path(prefix, name), place) for name in PYTHON):
            return f"lies in the Python installation {prefix}"
    if {"site-packages", "dist-packages"} & set(place.parts):
        return "lies among installed Python packages"
    for home in _homes():
        for name in SECRETS:
            if _holds(Path(os.path.realpath(home / name)), place):
                return f"lies in {home / name}, where keys are kept"
    return None


def _of_another(place: Path) -> str | None:
    """Why a folder is one that a command of ours made above it; None where it is none."""
    for above in place.parents:
        if not any(above.glob(".safebasin*.json")):
            continue
        for kind in ownership.LAYOUT:
            with contextlib.suppress(NotOurs):  # one that we did not write owns nothing
                owned = ownership.read(above, kind)
                top = f"{place.relative_to(above).parts[0]}/"
                if owned is not None and kind == "model":
                    return f"lies in the folder of a model ({above})"
                if owned is not None and top in owned.made:
                    return f"lies in {above / top}, which belongs to safebasin's {kind} in {above}"
    return None


def _homes() -> Iterable[Path]:
    found = [os.path.expanduser("~")]
    try:
        found.append(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:  # a container's user may have no entry
        found.append(found[0])
    return [Path(os.path.realpath(one)) for one in dict.fromkeys(found) if one and os.path.isdir(one) and Path(one).parent != Path(one)]


def _same(one: Path, other: Path) -> bool:
    if one == other:
        return True
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them is not there
        return False


def _holds(folder: Path, path: Path) -> bool:
    """Whether `folder` is `path` or lies above it; both are resolved."""
    return any(_same(folder, one) for one in (path, *path.parents))


def check_output(folder: Path, kind: str, inputs: Sequence[Input], *, field: str, result: str | None = None, overwrite: bool = False) -> None:
    """Refuse a folder a command must not write into: a place that is not its own, an earlier `result` of its own without `overwrite`, or
    files of somebody else's under the names it would make. Looks only. Raises ConfigError."""
    check(folder, inputs, field=field)
    owned = ownership.read(folder, kind)
    if owned is not None and result is not None and result in owned.made and (folder / result).exists() and not overwrite:
        more = "output.overwrite=true to replace what it left" if field == "output.dir" else "output.overwrite=true"
        raise ConfigError(f"{field} {str(folder)!r} holds an earlier {result}; give another folder, or {more}")
    refuse_foreign(folder, kind, owned, field)


def refuse_foreign(folder: Path, kind: str, owned: ownership.Owned | None, field: str) -> None:
    """Refuse names that the command would make and that somebody else made. Raises ConfigError."""
    try:
        found = ownership_checks.collisions(folder, kind, owned)
    except OSError as error:
        raise StorageError(f"{field} {str(folder)!r} cannot be looked into: {error.strerror}; give a folder you own") from error
    if not found:
        return
    names = ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
    also = " (output.overwrite=true removes only what is on that list)" if kind == "run" else ""
    who = "this run" if kind in ("run", "mirror") else f"safebasin's {kind}"
    it, was = ("them", "were") if len(found) > 1 else ("it", "was")
    raise ConfigError(
        f"{field} {str(folder)!r} holds {names}, which {who} would write and which {was} not made by it (its list is "
        f"{ownership.marker_name(kind)}); move {it} away, or give another folder" + also
    )
