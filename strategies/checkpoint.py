"""Checkpoints an interrupted training continues from: one file per worker, readable with `torch.load(weights_only=True)`.

    folder/step-00000050/rank-0.pt     this worker's shards
    folder/step-00000050/whole.json    {"step", "world_size", "signature", "folder", "serial", "sha256": {file: hash}, "check"}, written when all
                                       shards are
    folder/latest                      the same marker of the checkpoint in use, written last and replaced in one go

Two finished checkpoints are kept, the newest and the one before: what a killed save, a full disk or a bad disk damages costs the steps since
the other. A marker carries a hash of itself and of every shard; one that is torn counts as absent. Workers may share the folder or have one
each (of the same history): a worker that does not see worker 0's marker writes it, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from strategies.markers import LATEST, MARKER, age, file_hash, latest, marker_at, markers, seal, verify

__all__ = ["CheckpointError", "Reading", "digest", "latest", "random_state", "read", "set_random_state", "write"]


class CheckpointError(ValueError):
    """A checkpoint of another training, or one that another worker could not write; the message says what differs and what to do."""


@dataclass(frozen=True)
class Reading:
    """What `read` found."""

    step: int | None
    """Of the checkpoint; None where there is none to go on from."""
    state: dict[str, Any] = field(default_factory=dict)
    """This worker's."""
    trouble: str | None = None
    """What was damaged and what was taken instead, in a sentence; the same on every worker."""


def digest(value: Any) -> str:
    """Short content hash of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# ---- writing ------------------------------------------------------------------------------------------------------------------


def write(folder: str | Path, state: dict[str, Any], *, step: int, rank: int, world_size: int, signature: dict[str, Any]) -> None:
    """Write this worker's `state`; once all workers have, the markers say so and all but the two newest are dropped. Collective.

    A step that is saved again (a training that went back) gets another folder, so that a killed save leaves the older ones whole. Raises
    OSError where this worker cannot write, CheckpointError where another one cannot.
    """
    folder = Path(folder)
    known = markers(folder)
    used = marker_at(folder / LATEST) or next(iter(known), None)
    views = _gather(([path.name for path in folder.glob("step-*")], max([0, *(one["serial"] for one in known)]), used), world_size)
    home = folder / _free_name(step, {name for names, _, _ in views for name in names})
    before = views[0][2]["folder"] if views[0][2] else None
    try:
        _make_room(folder, before, home.name)
        home.mkdir(parents=True, exist_ok=True)
        _replace(home / f"rank-{rank}.pt", lambda path: torch.save(state, path))
        written, trouble, error = file_hash(home / f"rank-{rank}.pt"), None, None
    except OSError as caught:
        written, trouble, error = None, str(caught), caught
    answers = _gather((written, trouble), world_size)
    failed = next(((number, said) for number, (_, said) in enumerate(answers) if said is not None), None)
    if failed is not None:
        shutil.rmtree(home, ignore_errors=True)
        raise error or CheckpointError(f"worker {failed[0]} could not write its part of the checkpoint of step {step}: {failed[1]}")
    hashes = {f"rank-{number}.pt": one for number, (one, _) in enumerate(answers)}
    serial = 1 + max(serial for _, serial, _ in views)
    marker = seal({"step": step, "world_size": world_size, "signature": signature, "folder": home.name, "serial": serial, "sha256": hashes})
    if rank == 0:
        _point(folder, marker, before, strict=True)
    _barrier(world_size)
    if rank > 0 and (marker_at(home / MARKER) != marker or marker_at(folder / LATEST) != marker):
        _point(folder, marker, before, strict=False)


def _free_name(step: int, taken: set[str]) -> str:
    name = f"step-{step:08d}"
    tries = [name, f"{name}-again", *(f"{name}-again{number}" for number in range(2, len(taken) + 2))]
    return next(one for one in tries if one not in taken)


def _make_room(folder: Path, before: str | None, new: str) -> None:
    """Where the disk has no room for a third checkpoint, the older one goes first."""
    if before is None or not (folder / before).is_dir():
        return
    size = sum(path.stat().st_size for path in (folder / before).iterdir())
    if shutil.disk_usage(folder).free < size + size // 10:
        _drop(folder, {before, new}, strict=False)


def _point(folder: Path, marker: dict[str, Any], before: str | None, *, strict: bool) -> None:
    """Say that a checkpoint is finished, and drop all but it and the one before."""
    text = json.dumps(marker)
    _replace(folder / marker["folder"] / MARKER, lambda path: path.write_text(text))
    _replace(folder / LATEST, lambda path: path.write_text(text))
    _drop(folder, {marker["folder"], before}, strict=strict)


def _drop(folder: Path, kept: set[str | None], *, strict: bool) -> None:
    for old in folder.glob("step-*"):
        if old.name not in kept:
            shutil.rmtree(old, ignore_errors=not strict)  # a worker with an old view of worker 0's disk finds it gone


# ---- reading ------------------------------------------------------------------------------------------------------------------


def read(folder: str | Path, *, rank: int, world_size: int, signature: dict[str, Any]) -> Reading:
    """The newest checkpoint that is whole on every worker, else the one before, else nothing (`step` None). Collective.

    What is damaged is passed over and told in `trouble`. Raises CheckpointError where a checkpoint is of another training.
    """
    folder = Path(folder)
    views = _gather((markers(folder), _unmarked(folder)), world_size)
    candidates = {(one["folder"], one["serial"], one.get("check")): one for found, _ in views for one in found}
    troubles = list(next((said for _, said in views if said), []))
    for marker in sorted(candidates.values(), key=age, reverse=True):
        _check_ours(folder, marker, world_size, signature)
        state, damage = _load(folder / marker["folder"] / f"rank-{rank}.pt", marker)
        damages = [f"worker {number}: {said}" if world_size > 1 else said for number, said in enumerate(_gather(damage, world_size)) if said]
        if not damages:
            _use(folder, marker, rank, world_size)
            said = f"{'; '.join(troubles)}; the training goes on from the checkpoint of step {marker['step']}" if troubles else None
            return Reading(marker["step"], state, said)
        del state
        troubles.append(f"the checkpoint of step {marker['step']} is damaged ({'; '.join(damages)})")
    return Reading(None, trouble=f"{'; '.join(troubles)}; no other one is whole, so the training starts over" if troubles else None)


def _load(path: Path, marker: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """(state, None), or ({}, what is wrong). Only tensors and plain values are ever made of a file."""
    damage = verify(path, marker)
    if damage is not None:
        return {}, damage
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the bytes lead it to: of some ten classes, none with a common base
        return {}, f"{path.name} cannot be read, or holds something else than tensors and plain values: {' '.join(str(error).split())[:200]}"
    return (state, None) if isinstance(state, dict) else ({}, f"{path.name} holds no checkpoint")


def _check_ours(folder: Path, marker: dict[str, Any], world_size: int, signature: dict[str, Any]) -> None:
    if marker["world_size"] != world_size:
        raise CheckpointError(
            f"the checkpoint in {folder} was written by {marker['world_size']} worker(s), this training has {world_size};"
            f" resume with ray.num_workers={marker['world_size']}, or remove the folder to start over"
        )
    if marker["signature"] != signature:
        there = marker["signature"]
        what = ", ".join(f"{k} {there.get(k)} there, {v} here" for k, v in signature.items() if there.get(k) != v) or "it says more than ours"
        raise CheckpointError(f"the checkpoint in {folder} is of another training ({what}); remove the folder to start over")


def _unmarked(folder: Path) -> list[str]:
    """What is wrong with the markers of a folder, whatever its shards are."""
    path, found = folder / LATEST, [f"{path.parent.name}/{MARKER} is damaged" for path in folder.glob(f"step-*/{MARKER}") if marker_at(path) is None]
    if marker_at(path) is None and path.exists():
        return [f"{folder.name}/{LATEST} is damaged", *found]
    if marker_at(path) is None and markers(folder):
        return [f"{folder.name}/{LATEST} is missing", *found]
    if marker_at(path) is None and any(folder.glob("step-*")):
        return found or [f"{folder.name} holds a save that was not finished"]
    return found


def _use(folder: Path, marker: dict[str, Any], rank: int, world_size: int) -> None:
    """Let `latest` name the checkpoint in use, and mend its own marker: the next save keeps that one, and not a damaged one."""

    def point() -> None:
        for path in (folder / marker["folder"] / MARKER, folder / LATEST):
            if "check" in marker and marker_at(path) != marker:
                _replace(path, lambda temporary: temporary.write_text(json.dumps(marker)))

    if rank == 0:
        point()
    _barrier(world_size)
    if rank > 0:
        point()


# ---- inside -------------------------------------------------------------------------------------------------------------------


def _replace(path: Path, write_to) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_to(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _gather(value: Any, world_size: int) -> list[Any]:
    """Every worker's value, by rank. Collective."""
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def _barrier(world_size: int) -> None:
    if world_size > 1:
        dist.barrier()


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's generators that a training on `device` draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Put `random_state` back."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu())
