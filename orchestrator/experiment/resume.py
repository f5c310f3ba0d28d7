"""Going on with an interrupted run: what its output folder says is done, and what is left to do.

A finished trial has `trials/<id>/result.json` (see `trial_records`); `run.json` says what the run was begun with (see `identity`).
The folder's lock keeps a second driver out for as long as the first one lives.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from orchestrator import config
from orchestrator.config import Experiment, yaml_text
from orchestrator.errors import ConfigError
from orchestrator.experiment import amend
from orchestrator.experiment import identity as run_identity
from orchestrator.records import TrialResult, TrialSpec
from orchestrator.search import tune
from orchestrator.storage import addresses, files, nofollow, ownership, ownership_checks
from orchestrator.storage.layout import CONFIG, LOCK
from orchestrator.trial import record_check
from orchestrator.trial.record_check import BadRecord

log = logging.getLogger(__name__)


def load(folder: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of an output folder or address, set to go on there, with overrides that change nothing finished trials were measured by.

    Raises ConfigError where it holds no run of ours or an override may not change (`amend`), StorageError."""
    if addresses.is_address(str(folder)):
        from orchestrator.experiment import mirror

        path, place = mirror.read_config(str(folder)), addresses.checked(str(folder))
    else:
        path, place = Path(folder).absolute() / CONFIG, str(Path(folder).absolute())
    found = amend.amended(_config(path, place), overrides)
    output = found.output.model_copy(update={"dir": place, "overwrite": False, "resume": True})
    return found.model_copy(update={"output": output}).with_origin(())


def _config(path: Path, place: str) -> Experiment:
    """The resolved config; where it is gone or damaged, the one the run was begun with. A hand's mistake in it stays an error."""
    if _is_config(path):
        try:
            return config.load(path)
        except ConfigError as error:
            raise ConfigError(f"{error}; mend it, or move {path.name} away: the config in {run_identity.FILE} counts then") from error
    try:
        identity = run_identity.read(path.parent)
    except BadRecord:
        identity = None
    if identity is None and not addresses.is_address(place) and not os.path.isdir(place):
        raise ConfigError(f"{place} does not exist, so there is no run to resume; give the output folder of a run")
    if identity is None:
        raise ConfigError(f"{place} holds no {CONFIG} that can be read, so there is no run to resume; give the output folder of a run")
    begun = config.from_dict(identity.config)
    if os.path.lexists(path):
        log.warning("%s is damaged and was moved to %s; the config the run was begun with counts", path, record_check.move_aside(path).name)
    return begun


def _is_config(path: Path) -> bool:
    """Whether a file is there that was meant as a config: YAML, and at its top a mapping that is not empty."""
    try:
        text = nofollow.data_of(path, yaml_text.MOST_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return False
    return yaml_text.is_mapping(text)


def interrupted(experiment: Experiment, folder: Path) -> bool:
    """Whether the folder holds a run of this config to go on with. Raises ConfigError where it holds one of another config.

    What does not decide a trial's figures (budgets, names, places, machines) may differ.
    """
    kept = any((folder / name).is_file() for name in (CONFIG, run_identity.FILE)) or any(folder.glob("trials/t*/*.json"))
    if kept:
        run_identity.check_config(folder, experiment)
    return kept


def identify(experiment: Experiment, folder: Path, facts: dict[str, str], say: Callable[[str], None], *, resumed: bool) -> str:
    """The id of a run that begins, which is written down with what it works with, or of one that is gone on with, after a check that
    it works with the same. `facts`: hashes of model and template. Raises ConfigError, StorageError."""
    content = run_identity.content(experiment, facts)
    if resumed:
        return take_over(folder, experiment, content, say)
    begun = run_identity.new(experiment, content)
    run_identity.write(folder, begun)
    return begun.run


def take_over(folder: Path, experiment: Experiment, content: dict[str, str], say: Callable[[str], None]) -> str:
    """Check that a resumed run works with what it was begun with, write down what changed without harm, and return its id.

    Raises ConfigError that names data, suites or model whose content changed, StorageError.
    """
    copied = ownership_checks.taken_up(folder)
    if copied:
        say(copied)
    try:
        identity = run_identity.read(folder)
    except BadRecord as error:
        say(f"warning: {error}; it was moved to {record_check.move_aside(folder / run_identity.FILE).name}")
        identity = None
    if identity is None:
        same = run_identity.check_marks(folder, experiment)
        rest = "data and model" if same else "limits, recipes, suites, training, data and model"
        say(f"warning: {folder} does not say what its run was begun with, so whether {rest} are still the same cannot be checked")
        identity = run_identity.new(experiment, content, run_identity.lost(folder) or None)
        run_identity.write(folder, identity)
    else:
        unknown = run_identity.check_content(identity.content, content, folder)
        if unknown:
            say(f"warning: {folder / run_identity.FILE} holds no hash of {', '.join(unknown)}, so whether that is still the same cannot be checked")
        if not run_identity.begun_with(folder)[1] and not run_identity.check_marks(folder, experiment):
            say(f"warning: the config in {folder / run_identity.FILE} is of another version, so whether limits, recipes and suites are still the "
                "same cannot be checked")  # fmt: skip
    changed = run_identity.check_config(folder, experiment)
    if changed:
        say(f"changed since the run began: {', '.join(changed)}")
    if changed or not _says(folder / CONFIG, experiment):
        files.write_text(folder / CONFIG, config.dump_yaml(experiment))
    return identity.run


def _says(path: Path, experiment: Experiment) -> bool:
    """Whether the resolved config is there and says what the run goes on with, places aside: what one resume changed another may change back."""
    try:
        written = config.load(path)
    except (ConfigError, OSError):
        return False
    return written.model_dump(exclude={"output"}) == experiment.model_dump(exclude={"output"})


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """This driver's hold on the folder. Raises ConfigError where another driver that lives has it."""
    folder.mkdir(parents=True, exist_ok=True)
    ownership.claim(folder / LOCK)  # the lock empties the file it is taken on
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"output.dir {str(folder)!r} is in use by another run that is still going; wait for it or give another output.dir"
        ) from None
    try:
        ownership_checks.begun(folder)
        yield
    finally:
        lock.release()


def spec_of(experiment: Experiment, result: TrialResult, folder: Path, dump: dict) -> TrialSpec:
    """The spec a finished trial ran by."""
    return tune.build_spec(
        experiment, trial_id=result.trial_id, recipe=result.recipe, params=result.params, seed=result.seed, phase=result.phase,
        folder=str(folder / "trials" / result.trial_id), dump=dump,
    )  # fmt: skip
