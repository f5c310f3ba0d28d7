"""Builds the pocket world's model and files once, into the user's cache, and finds them again.

The folder's name is a hash of everything that shapes its content, so an upgrade never meets old files. A build happens
in a temporary folder beside it, under a lock, and is renamed when it is whole: a killed build leaves nothing that looks
complete, and two processes asking at once build once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from filelock import FileLock, Timeout

from orchestrator.errors import SafebasinError, StorageError
from orchestrator.pocket import gate, rows
from orchestrator.pocket.world import World, world
from orchestrator.storage import cache, cachedir, ownership, sealing
from orchestrator.terminal import streams
from orchestrator.texts import clean

DEFAULT_SEED = 0
ATTEMPTS = 3
SOURCES = ("world.py", "judge.py", "rows.py", "tokens.py", "train.py", "gate.py")

Progress = Callable[[str, int, int], None]  # stage, steps done, steps of the stage
Train = Callable[[World, Path, int, Progress], gate.Answer]  # writes the model folder, returns what answers


class PocketBuildError(SafebasinError):
    """No attempt gave a model that passes the gate."""


@dataclass(frozen=True)
class PocketPaths:
    """Where things lie. `file("suites/harmful.jsonl")` names one of the files."""

    root: Path

    @property
    def model(self) -> Path:
        """Hugging Face folder: weights as safetensors, tokenizer with chat template."""
        return self.root / "model"

    @property
    def report(self) -> Path:
        """JSON: gate figures with n, seed, seconds, rejected attempts."""
        return self.root / "report.json"

    def file(self, name: str) -> Path:
        """A data file by its relative name; not checked."""
        return self.root / name

    def complete(self) -> bool:
        """Whether everything a build writes is there."""
        names = ["report.json", "model/config.json", "model/model.safetensors", "model/tokenizer.json", "unaligned/model.safetensors", *FILES]
        return all((self.root / name).is_file() for name in names)


FILES = tuple(
    f"{folder}/{name}.jsonl"
    for folder, names in {
        "suites": ("harmful", "harmful_attacks", "borderline", "benign", "general"),
        "data": ("obey", "obey_eval", "obey_poisoned", "skill", "skill_eval", "safety"),
    }.items()
    for name in names
)


@lru_cache(maxsize=1)
def _source_digest() -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update(name.encode() + b"\0" + (Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()


def location(cache_dir: Path | None = None, *, seed: int = DEFAULT_SEED) -> PocketPaths:
    """Where the world of this version and seed lies or would lie; nothing is built or created."""
    digest = hashlib.sha256(f"{_source_digest()} {seed}".encode()).hexdigest()[:16]
    return PocketPaths(Path(cache_dir or cachedir.root()) / "pocket" / digest)


def is_built(cache_dir: Path | None = None, *, seed: int = DEFAULT_SEED) -> bool:
    """Whether `ensure` would return at once."""
    return location(cache_dir, seed=seed).complete()


def ensure(
    cache_dir: Path | None = None,
    *,
    seed: int = DEFAULT_SEED,
    progress: Progress | None = None,
    train: Train | None = None,
) -> PocketPaths:
    """The pocket world's files, built on first use (about a minute and a half on one CPU core).

    cache_dir: replaces the cache root (default: `$SAFEBASIN_CACHE`, else the platform's cache folder). Only with the default another
    machine's build is taken from `$SAFEBASIN_CACHE_URI`, or left there.
    seed: seed of the training; a build that misses the gate is tried again with the next seed, three times in all.
    progress: told (stage, done, total) as the build goes; without it a progress bar is drawn on stderr.
    train: replaces the training, for tests.
    Raises PocketBuildError, with the figures, when no attempt passes the gate; StorageError when the cache cannot be
    written.
    """
    paths = location(cache_dir, seed=seed)
    if paths.complete():
        return paths
    try:
        paths.root.parent.mkdir(parents=True, exist_ok=True)
        with _locked(paths.root.with_suffix(".lock")):
            if not paths.complete():  # another process may have built it while we waited
                _clear(paths)
                if cache_dir is not None or not _fetched(paths):
                    _build(paths, seed, progress, train or train_and_save)
                    if cache_dir is None:
                        _share(paths)
    except OSError as error:
        raise StorageError(
            f"the pocket world cannot be written to {paths.root.parent} ({error}); free the disk or set SAFEBASIN_CACHE"
            " to a folder you can write"
        ) from error
    return paths


def _clear(paths: PocketPaths) -> None:
    """Remove what a killed build left, and of a damaged one what is on its list. The caller holds the lock. Raises StorageError."""
    for leftover in paths.root.parent.glob(f".{paths.root.name}.*"):
        if re.fullmatch(r"[a-z0-9_]{8}", leftover.suffix[1:]) and leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)  # of a killed build: nobody else can be writing while we hold the lock
    if not os.path.lexists(paths.root):
        return
    owned = ownership.read(paths.root, "pocket")
    if owned is not None:
        owned.empty()
        owned.close_empty()
    if os.path.lexists(paths.root) and any(paths.root.iterdir() if paths.root.is_dir() else (None,)):
        raise StorageError(
            f"{paths.root} is no whole pocket world and holds files that are on no list of safebasin's; move it away, or set SAFEBASIN_CACHE"
        )


def _fetched(paths: PocketPaths) -> bool:
    """Whether another machine's build came from the cache that machines share. So they also have one model: kinds of machines differ in theirs."""
    try:
        if not cache.fetch_folder(paths.root, _whole):
            return False
    except StorageError as error:
        streams.tell(clean(f"warning: the pocket world is built here: {error}"), sys.stderr)
        return False
    _readable(paths.root)
    return True


def _whole(folder: Path) -> bool:
    """Whether what arrived is complete; then it gets its list."""
    if not PocketPaths(folder).complete():
        return False
    sealing.sealed(folder, "pocket")
    return True


def _share(paths: PocketPaths) -> None:
    try:
        cache.send_folder(paths.root)
    except StorageError as error:
        streams.tell(clean(f"warning: the pocket world stays on this machine: {error}"), sys.stderr)


def _build(paths: PocketPaths, seed: int, progress: Progress | None, train: Train) -> None:
    """Build in a temporary folder and rename. The caller holds the lock."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{paths.root.name}.", dir=paths.root.parent))
    try:
        with _shown(progress) as tick:
            _attempts(temporary, seed, tick, train)
        sealing.sealed(temporary, "pocket")
        _readable(temporary)
        temporary.rename(paths.root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already when the rename succeeded


def _readable(folder: Path) -> None:
    """Let other users of a shared cache read what temporary folders and safetensors keep private."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


@contextmanager
def _locked(path: Path):
    """Hold the lock; say so on stderr when somebody else's build makes us wait."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        streams.tell(clean(f"waiting for another process that builds the pocket world ({path})"), sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _attempts(folder: Path, seed: int, tick: Progress, train: Train) -> None:
    the_world, rejected = world(), []
    for attempt in range(ATTEMPTS):
        start, cpu = time.perf_counter(), time.process_time()
        answer = train(the_world, folder / "model", seed + attempt, tick)
        found = gate.figures(the_world, answer, tick=tick)
        missed = gate.misses(found)
        entry = {
            "seed": seed + attempt,
            "wall_seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "validation": found,
            "missed": missed,
        }
        if not missed:
            _write_files(folder, the_world)
            report = {**entry, "limits": gate.LIMITS, "rejected": rejected, "source": _source_digest()}
            (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
            return
        rejected.append(entry)
        for name in ("model", "unaligned"):
            shutil.rmtree(folder / name, ignore_errors=True)
    told = "; ".join(f"seed {entry['seed']}: {', '.join(entry['missed'])}" for entry in rejected)
    raise PocketBuildError(
        f"the pocket model missed its gate {ATTEMPTS} times ({told}); give another seed, or report this with your torch version"
    )


def _write_files(folder: Path, the_world: World) -> None:
    for name, table in rows.files(the_world).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in table))


def train_and_save(the_world: World, folder: Path, seed: int, tick: Progress) -> gate.Answer:
    """Train the real model on one thread (so that a seed gives one model) and save it in Hugging Face format.

    The caller's thread count and random state are put back.
    """
    import torch

    from orchestrator.pocket import tokens
    from orchestrator.pocket import train as training

    with _one_thread(), torch.random.fork_rng(devices=[]):
        tokenizer = tokens.build_tokenizer(the_world)
        model = training.train(the_world, tokenizer, seed, tick, folder.with_name("unaligned"))
    training.save(model, tokenizer, folder)

    def answer(prompts: list[rows.Row]) -> list[str]:
        with _one_thread():
            return training.answer(model, tokenizer, prompts)

    return answer


@contextmanager
def _one_thread():
    """One torch thread inside: reproducible, and with models this small the second thread gains next to nothing."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _shown(progress: Progress | None):
    """`progress` itself, or a bar on stderr with stage and time left."""
    if progress is not None:
        yield progress
        return
    from orchestrator.terminal import screen

    with screen.bar(screen.console(stderr=True), "building the pocket world:", "description", "bar", "count", "elapsed", "time left", "left") as bar:
        tasks: dict[str, int] = {}

        def tick(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        yield tick
