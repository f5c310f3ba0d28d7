"""Where a trial's files lie on a worker's machine, and their copy below the run's address where `output.dir` is one.

With a folder nothing here does anything. With an address every worker writes to a folder of its own machine and uploads what others
need: each its shard of a checkpoint, then worker 0 the marker; worker 0 the trained model and trainings that trials share. A trial that
is taken up again on another machine downloads its checkpoint first. What cannot be uploaded stays here and is said; training goes on.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.config import Experiment
from orchestrator.errors import StorageError
from orchestrator.records import LaneContext, TrialSpec
from orchestrator.storage import buckets, files
from orchestrator.storage.layout import CHECKPOINT, GOOD
from orchestrator.trial import shared_training
from strategies import markers

LATEST = "latest"
MODEL_PATIENCE = 300.0
"""Seconds a store that does not answer is asked to take a trained model."""
MANIFEST = ".mirror.json"
"""In the driver's copy of an address (see `mirror`): a worker that sees it shares the driver's disk."""


@dataclass
class TrialFiles:
    """The files of one trial on one worker. Methods are collective unless they say otherwise."""

    dir: Path
    """The trial's folder here."""
    home: Path
    """The run's folder here."""
    store: buckets.Store | None
    name: str
    """Of the trial's folder below the run's."""
    context: LaneContext
    troubles: list[str] = field(default_factory=list)
    """What could not be uploaded, and why; the same on every worker but for what one alone does."""
    _sent: dict[str, Any] = field(default_factory=dict)

    def begin(self, again: bool) -> None:
        """Before training: with `again` bring the newest checkpoint here that is whole on every worker, otherwise leave none. Raises StorageError."""
        if self.store is None:
            return
        if not again or not (self._bring(GOOD) and self._bring(CHECKPOINT)):
            for kind in (CHECKPOINT, GOOD):
                if (self.dir / kind).exists():
                    shutil.rmtree(self.dir / kind)

    def _bring(self, kind: str) -> bool:
        """Have the newest whole checkpoint of a kind on this disk, from here or the store; False where there are some and none is whole."""
        there, troubles = self._of_first(lambda: self._markers_there(kind))
        views = self.context.peers.gather(markers.markers(self.dir / kind))
        known = {(one["folder"], one["serial"], one.get("check")): one for found in (there, *views) for one in found}
        for marker in sorted(known.values(), key=lambda one: (one["serial"], one["step"]), reverse=True):
            damages = [said for said in self.context.peers.gather(self._shard(kind, marker, marker in there)) if said is not None]
            if not damages:
                self._lay_down(kind, marker)
                break
            troubles.append(f"{self._below}/{kind}/{marker['folder']}: {damages[0]}")
        else:
            marker = None
        for trouble in troubles:
            self._note(f"{self.store.shown}: {trouble}; {'the training starts over' if marker is None else 'the one before is used'}")
        return marker is not None or not troubles

    def _shard(self, kind: str, marker: dict[str, Any], there: bool) -> str | None:
        """Have this worker's shard here; what is wrong with it, else None. A checkpoint of another number of workers is refused where it is read."""
        if marker["world_size"] != self.context.world_size:
            return None
        name = f"{marker['folder']}/rank-{self.context.rank}.pt"
        path = self.dir / kind / name
        damage = markers.verify(path, marker)
        if damage is not None and there and self.store.get(f"{self._below}/{kind}/{name}", path):
            damage = markers.verify(path, marker)
        return damage

    def _lay_down(self, kind: str, marker: dict[str, Any]) -> None:
        """The marker, where the shard is; whatever else lies there is of no use any more."""
        folder = self.dir / kind
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / LATEST, json.dumps(marker))
        if "sha256" in marker:
            (folder / marker["folder"]).mkdir(exist_ok=True)
            files.write_text(folder / marker["folder"] / markers.MARKER, json.dumps(marker))
        for old in folder.glob("step-*"):
            if old.name != marker["folder"]:
                shutil.rmtree(old, ignore_errors=True)

    def send_checkpoint(self) -> str | None:
        """After `engine.save`: upload the state to go back to where it is new, then the markers. What could not be done, in a sentence."""
        if self.store is None:
            return None
        for kind in (GOOD, CHECKPOINT):
            trouble = self._send(kind)
            if trouble is not None:
                return self._note(f"{trouble}; a trial that loses its machine goes on from the checkpoint before this one")
        return None

    def _send(self, kind: str) -> str | None:
        marker = markers.latest(self.dir / kind)
        if marker is None or self._sent.get(kind) == marker:
            return None
        shard = f"{marker['folder']}/rank-{self.context.rank}.pt"
        name = f"{self._below}/{kind}"
        trouble = self._first_trouble(lambda: self.store.put(self.dir / kind / shard, f"{name}/{shard}"))
        if trouble is not None:
            return trouble

        def finish() -> None:
            if self.context.rank == 0:
                text = json.dumps(marker).encode()
                self.store.write(f"{name}/{marker['folder']}/{markers.MARKER}", text)
                self.store.write(f"{name}/{LATEST}", text)
                kept = {marker["folder"], (self._sent.get(kind) or marker)["folder"]}
                old = {key.split("/")[3] for key in self.store.list(name) if key.count("/") > 3} - kept
                for folder in sorted(old):
                    self.store.delete(f"{name}/{folder}")

        trouble = self._first_trouble(finish)
        if trouble is None:
            self._sent[kind] = marker
        return trouble

    def kept(self, where: Path) -> bool:
        """Whether a whole training that trials share is at hand; one that only the store holds is brought here. Not collective."""
        if shared_training.kept(where) and not self._damaged(where):
            return True
        if self.store is None:
            return False
        from filelock import FileLock

        where.mkdir(parents=True, exist_ok=True)
        with FileLock(where / ".lock"):  # the workers of a machine share one copy
            below = f"trained/{where.name}"
            whole = shared_training.kept(where) and shared_training.damage(where) is None  # another worker may have brought it
            if not whole and self.store.exists(f"{below}/{shared_training.WEIGHTS}"):
                self.store.get(f"{below}/{shared_training.FACTS}", where / shared_training.FACTS)
                self.store.get(f"{below}/{shared_training.WEIGHTS}", where / shared_training.WEIGHTS)
                whole = not self._damaged(where)
        return whole

    def _damaged(self, where: Path) -> bool:
        found = shared_training.damage(where)
        if found is not None:
            self._note(f"a training that trials share is damaged: {found}; it is trained again")
        return found is not None

    def send_trained(self, where: Path) -> None:
        """Worker 0 alone: a shared training, its weights last."""
        self._alone(lambda: self.store.put_folder(where, f"trained/{where.name}", last=shared_training.WEIGHTS))

    def send_results(self) -> None:
        """Worker 0 alone, at the end of a trial: the trained model and kept generations; on another machine than the driver's they leave its disk."""
        if self.store is None or self.context.rank != 0:
            return
        patient = buckets.Store(self.store.fs, self.store.root, self.store.shown, max(MODEL_PATIENCE, self.store.patience))

        def send() -> None:
            if (self.dir / "model").is_dir():
                patient.put_folder(self.dir / "model", f"{self._below}/model")
            if (self.dir / "generations.jsonl").is_file():
                patient.put(self.dir / "generations.jsonl", f"{self._below}/generations.jsonl")

        if self._alone(send) and not (self.home / MANIFEST).is_file():
            for name in ("model", "generations.jsonl"):
                path = self.dir / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def end(self) -> None:
        """A trial that ended by itself needs no checkpoint on this disk; the driver removes those in the store. Not collective.

        Also where this machine's worker had another rank before it was interrupted.
        """
        if self.store is None:
            return
        for folder in (self.home / "trials" / self.name, *self.home.glob(f"workers/rank-*/trials/{self.name}")):
            for kind in (CHECKPOINT, GOOD):
                shutil.rmtree(folder / kind, ignore_errors=True)

    # -- inside ------------------------------------------------------------------------------------------------------

    @property
    def _below(self) -> str:
        return f"trials/{self.name}"

    def _markers_there(self, kind: str) -> tuple[list[dict[str, Any]], list[str]]:
        """Markers that the store holds, and what is wrong with those that are none of ours or damaged."""
        below, found, troubles = f"{self._below}/{kind}", [], []
        for name in self.store.list(below):
            inner = name.removeprefix(f"{below}/")
            if inner != LATEST and not re.fullmatch(rf"{markers.NAME.pattern}/{re.escape(markers.MARKER)}", inner):
                continue
            marker = markers.parse(self.store.read(name))
            if marker is None:
                troubles.append(f"{name} is damaged, or none of ours")
            elif marker not in found:
                found.append(marker)
        return found, troubles

    def _alone(self, action: Callable[[], None]) -> bool:
        if self.store is None or self.context.rank != 0:
            return True
        try:
            action()
        except StorageError as error:
            self._note(str(error))
            return False
        return True

    def _note(self, sentence: str) -> str:
        if sentence not in self.troubles:
            self.troubles.append(sentence)
        return sentence

    def _first_trouble(self, action: Callable[[], None]) -> str | None:
        """Do it on every worker; the first worker's trouble, on all of them."""
        trouble = None
        try:
            action()
        except StorageError as error:
            trouble = str(error)
        return next((one for one in self.context.peers.gather(trouble) if one is not None), None)

    def _of_first(self, read: Callable[[], Any]) -> Any:
        """What worker 0 reads, on every worker; its error too."""
        found, error = None, None
        if self.context.rank == 0:
            try:
                found = read()
            except StorageError as trouble:
                error = str(trouble)
        found, error = self.context.peers.gather((found, error))[0]
        if error is not None:
            raise StorageError(error)
        return found


def of(spec: TrialSpec, experiment: Experiment, context: LaneContext) -> TrialFiles:
    """The files of a trial on this worker. Every worker but the first has a folder of its own, whether or not they share a disk."""
    folder = Path(spec.dir)
    address = experiment.output_address
    if address is None:
        return TrialFiles(folder, folder.parent.parent, None, folder.name, context)
    if ("store", address) not in context.cache:
        context.cache[("store", address)] = buckets.open(address)
    home = experiment.output_dir
    own = home if context.rank == 0 else home / "workers" / f"rank-{context.rank}"
    return TrialFiles(own / "trials" / folder.name, home, context.cache[("store", address)], folder.name, context)
