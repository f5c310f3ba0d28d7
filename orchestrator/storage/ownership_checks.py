"""What speaks against taking a folder's list at its word: another folder's marker, links in the place of files, files changed since the run ended."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import ConfigError, StorageError
from orchestrator.storage import folder_stamps, ownership
from orchestrator.storage.ownership import NotOurs, Owned
from orchestrator.storage.ownership_names import LAYOUT, LINKS, MODEL, WORKERS, marker_name

KILLED_SLACK_NS = 120 * 10**9
"""How much later than its last sign of life a file of a run that was killed may be: workers and Ray may have written on for a while."""
DRIVER_SLACK_NS = 2 * 10**9
"""The same for what the driver alone writes."""
BY_WORKERS = ("ray/", "trials/", "trained/", ".model.partial/", "study.journal", "tracking.")
LOCKS = (".running.lock", "study.journal.lock")
RESULTS = ("report.", "best.", "plots/", "tables/", MODEL, "transitions.csv", "flipped.csv", "categories.csv")
"""What a resumed run writes anew at its end, and nobody edits to mend a run."""


def collisions(folder: Path, kind: str, owned: Owned | None) -> list[str]:
    """Names that a command of this kind would make and that are there, but are not on its list. Sorted."""
    list_ = owned or Owned(folder, kind, "")
    there = [name for name in LAYOUT[kind] if name != "*" and os.path.lexists(folder / name.rstrip("/"))]
    return sorted(name.rstrip("/") for name in there if _is_foreign(list_, name))


def _is_foreign(owned: Owned, name: str) -> bool:
    """Whether a name at the top that is there is somebody else's."""
    path = owned.folder / name.rstrip("/")
    if name in owned.made and name == MODEL and any(path.iterdir() if path.is_dir() else (None,)):
        return path.is_symlink() or ownership.read(path, "model") is None
    if owned.kind == "mirror" and name in WORKERS and path.is_dir() and not path.is_symlink():
        return False
    return name not in owned.made and not (name.endswith("/") and owned.shared(name))


def links(owned: Owned) -> list[str]:
    """Names of ours, at any depth, that are links now: somebody moved what they point to. Ray's own links are none of these. Sorted."""
    found = []
    for name, path in _entries(owned):
        if not name.startswith(("ray/", "mlartifacts/")) and name not in LINKS and path.is_symlink():
            nested = name.startswith(MODEL) and (model := _model(owned)) is not None and {name[len(MODEL) :], name[len(MODEL) :] + "/"} & model.made
            if owned.owns(name) or owned.owns(f"{name}/") or nested:
                found.append(name)
    return sorted(found)


def _entries(owned: Owned) -> Iterator[tuple[str, Path]]:
    """(name, path) of every file and link at or below what is listed; no link is entered. Raises OSError where a folder cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    for top in sorted({made.split("/")[0] for made in owned.made}):
        path = owned.folder / top
        if path.is_symlink() or not path.is_dir():
            if os.path.lexists(path):
                yield top, path
            continue
        for where, folders, files in os.walk(path, onerror=fail):
            for name in sorted(files + [one for one in folders if os.path.islink(os.path.join(where, one))]):
                inner = Path(where, name)
                yield inner.relative_to(owned.folder).as_posix(), inner


def _model(owned: Owned) -> Owned | None:
    try:
        return ownership.read(owned.folder / MODEL, "model")
    except NotOurs:
        return None


def changed(owned: Owned) -> list[str]:
    """Names of files on a run's list, or below it, that somebody changed or put there since the run ended, as their times tell. Sorted.

    The run's end is on its list, by the clock of the folder's disk. A run that was killed has written down none: then the newest of its list and
    of the files it writes again and again (`folder_stamps.SIGNS`) counts, and a file may be 2 s younger, or 120 s where workers and Ray write. In
    a folder that was taken up as a copy (`begun`) everything that came with it counts as changed. Raises OSError.
    """
    latest = owned.ended if owned.ended is not None else folder_stamps.last_sign(owned.folder, owned.written)

    def later(name: str, moment: int) -> bool:
        workers = name.startswith(BY_WORKERS)
        slack = 0 if owned.ended is not None else KILLED_SLACK_NS if workers else DRIVER_SLACK_NS
        return moment > latest + slack or (owned.since is not None and moment < owned.since)

    return [name for name, moment in _times(owned) if name in owned.changed or later(name, moment)]


def _times(owned: Owned) -> list[tuple[str, int]]:
    """(name, when it was last changed in ns) of every file that an overwrite would delete. Sorted."""
    model, found = _model(owned), []
    for name, path in _entries(owned):
        list_, inner = (model, name[len(MODEL) :]) if model is not None and name.startswith(MODEL) else (owned, name)
        try:
            state = path.lstat()
        except FileNotFoundError:
            continue
        if name not in LOCKS and list_.file_is_ours(inner, state.st_mode):
            found.append((name, max(state.st_mtime_ns, state.st_ctime_ns)))
    return sorted(found)


def refuse(owned: Owned, *, overwrite: bool, resume: bool = False) -> None:
    """Refuse to delete or replace what is not proven to be the run's, before anything is written. Looks only. Raises ConfigError, StorageError."""
    shown = f"output.dir {str(owned.folder)!r}"
    try:
        linked = links(owned)
        bound = owned.kind != "run" or folder_stamps.same_place(owned.place, owned.folder)
        later = changed(owned) if owned.kind == "run" and bound and (overwrite or owned.ended is not None) else []
    except OSError as error:
        raise StorageError(f"{shown} cannot be looked into: {error.strerror}; give a folder you own") from error
    if linked:
        raise ConfigError(
            f"{shown}: {_listed(linked)} became links since the run made them, and nothing is written to or removed from what they point to; put "
            "the folders back, or give another output.dir"
        )
    if not bound and not resume:
        whose = "by an earlier version, which did not note its folder" if owned.place is None else "for another folder (this one is a copy)"
        raise ConfigError(
            f"{shown}: its {marker_name('run')} was written {whose}, so it does not say what may be removed or replaced here; move it away or give "
            "another output.dir"
        )
    if not overwrite:
        later = [name for name in later if name.startswith(RESULTS)]
    if later:
        would = "output.overwrite=true would remove" if overwrite else "a resumed run would replace"
        it, was = ("them", "were") if len(later) > 1 else ("it", "was")
        raise ConfigError(
            f"{shown}: {_listed(later)} {was} changed or put there since the run ended, and {would} {it}; move {it} away, or give another output.dir"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def begun(folder: Path) -> None:
    """Note that a run, which holds the folder's lock, goes on. Raises StorageError.

    What somebody changed since an earlier one ended is remembered as theirs. A list that came with a copy of its folder is bound to this one; what
    workers left in the copy is not deleted from then on, and its results are set aside, since nothing proves that they are as the run left them.
    """
    owned = ownership.current(folder)
    if owned is None or owned.kind != "run" or owned.running:
        return
    try:
        if not folder_stamps.same_place(owned.place, folder):
            owned.place, owned.since, owned.taken_up = folder_stamps.place_of(folder), folder_stamps.now(folder), True
            _set_results_aside(folder)
            owned.prune()
        elif owned.since is None:
            owned.changed = set(changed(owned))
    except OSError as error:
        raise StorageError(f"output.dir {str(folder)!r} cannot be looked into: {error.strerror}; give a folder you own") from error
    owned.ended, owned.running = None, True
    owned.save()


def _set_results_aside(folder: Path) -> None:
    """Rename what the run's end writes anew: `report.html` to `report.html.before-1`, or the first number that is free. Raises OSError."""
    for name in sorted(os.listdir(folder)):
        is_result = f"{name}/".startswith(RESULTS) and ".before-" not in name
        if is_result:
            number = 1
            while os.path.lexists(folder / f"{name}.before-{number}"):
                number += 1
            os.rename(folder / name, folder / f"{name}.before-{number}")


def taken_up(folder: Path) -> str | None:
    """A sentence where the run that goes on here was begun in another folder, of which this one is a copy."""
    owned = ownership.current(folder)
    if owned is None or not owned.taken_up:
        return None
    owned.taken_up = False
    return f"{folder} is a copy of the folder its run began in: trained models that came with it are kept, and its results are now NAME.before-N"
