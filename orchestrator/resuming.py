"""Going on with an interrupted run: what its output folder says is done, and what is left to do.

A finished trial has `trials/<id>/result.json`; one that a stop or a death interrupted has none (or one marked cancelled) and perhaps a
checkpoint. The folder's lock keeps a second driver out for as long as the first one lives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from orchestrator import addresses, config, outputs, search
from orchestrator.config import Experiment
from orchestrator.errors import ConfigError
from orchestrator.records import TrialResult, TrialSpec

LOCK = ".running.lock"
CONFIG = "config.resolved.yaml"


def load(folder: str | Path) -> Experiment:
    """The experiment of an output folder or address, set to go on there. Raises ConfigError where it holds no run of ours, StorageError."""
    if addresses.is_address(str(folder)):
        from orchestrator import mirror

        path, place = mirror.read_config(str(folder)), addresses.checked(str(folder))
    else:
        path, place = Path(folder).absolute() / CONFIG, str(Path(folder).absolute())
    if not path.is_file():
        raise ConfigError(f"{place} holds no {CONFIG}, so there is no run to resume; give the output folder of a run")
    found = config.load(path)
    output = found.output.model_copy(update={"dir": place, "overwrite": False, "resume": True})
    return found.model_copy(update={"output": output})


def interrupted(experiment: Experiment, folder: Path) -> bool:
    """Whether the folder holds a run of this config to go on with. Raises ConfigError where it holds one of another config."""
    path = folder / CONFIG
    if not path.is_file():
        return False
    theirs = config.load(path)
    if theirs.digest() != experiment.digest():
        raise ConfigError(
            f"output.dir {experiment.output_place!r} holds a run of another config ({_difference(theirs, experiment)}); resume it with "
            "`safebasin resume`, give another output.dir, or output.overwrite=true"
        )
    return True


def _difference(a: Experiment, b: Experiment) -> str:
    """The first keys in which two configs differ."""

    def flat(value, prefix=""):
        if isinstance(value, dict):
            return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}{key}.").items()}
        return {prefix.rstrip("."): value}

    one, other = (
        flat(x.model_dump(mode="json", exclude={"ray", "tracking", "output", "name", "variables"})) | {"ray.num_workers": x.ray.num_workers}
        for x in (a, b)
    )
    keys = [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
    return ", ".join(f"{key}: {one.get(key)!r} there, {other.get(key)!r} here" for key in keys[:3])


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """This driver's hold on the folder. Raises ConfigError where another driver that lives has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"output.dir {str(folder)!r} is in use by another run that is still going; wait for it or give another output.dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


def finished(folder: Path) -> list[TrialResult]:
    """Results of the trials that ended by themselves, in the order they ended; those a stop cut short are not among them."""
    paths = sorted((folder / "trials").glob("*/result.json"), key=lambda path: path.stat().st_mtime_ns)
    results = [TrialResult.from_dict(raw) for path in paths if (raw := outputs.read_json(path)) is not None]
    return [r for r in results if r.phase != "baseline" and not r.facts.get("cancelled")]


def spec_of(experiment: Experiment, result: TrialResult, folder: Path, dump: dict) -> TrialSpec:
    """The spec a finished trial ran by."""
    return search.build_spec(
        experiment, trial_id=result.trial_id, recipe=result.recipe, params=result.params, seed=result.seed, phase=result.phase,
        folder=str(folder / "trials" / result.trial_id), dump=dump,
    )  # fmt: skip
