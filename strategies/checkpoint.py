"""Checkpoints an interrupted training continues from: one file per worker, readable with `torch.load(weights_only=True)`.

    folder/latest                      {"step", "world_size", "signature"}, written last and replaced in one go
    folder/step-00000050/rank-0.pt     this worker's shards

A save that is killed half-way leaves `latest` at the one before it. One finished checkpoint is kept. Workers may share the folder or have one
each (of the same history): a worker that does not see worker 0's marker writes it, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle  # for the name of torch's error only
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LATEST = "latest"


class CheckpointError(ValueError):
    """A checkpoint that does not fit this training; the message says what differs and what to do."""


def digest(value: Any) -> str:
    """Short content hash of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def latest(folder: str | Path) -> dict[str, Any] | None:
    """What the newest finished checkpoint is (`step`, `world_size`, `signature`), None where there is none."""
    path = Path(folder) / LATEST
    return json.loads(path.read_text()) if path.exists() else None


def write(folder: str | Path, state: dict[str, Any], *, step: int, rank: int, world_size: int, signature: dict[str, Any]) -> None:
    """Write this worker's `state`; once all workers have, `latest` points at it and older ones are dropped. Collective.

    A step that is saved again (a training that went back) gets another folder, so that a killed save leaves the older one whole.
    """
    folder = Path(folder)
    before, home = latest(folder), _home(folder, step)
    if before is not None and before.get("folder", _home(folder, before["step"]).name) == home.name:
        home = home.with_name(f"{home.name}-again")
    home.mkdir(parents=True, exist_ok=True)
    _replace(home / f"rank-{rank}.pt", lambda path: torch.save(state, path))
    _barrier(world_size)
    marker = {"step": step, "world_size": world_size, "signature": signature, "folder": home.name}
    if rank == 0:
        _point(folder, marker, strict=True)
    _barrier(world_size)
    if rank > 0 and latest(folder) != marker:
        _point(folder, marker, strict=False)


def _point(folder: Path, marker: dict[str, Any], *, strict: bool) -> None:
    """Point `latest` at a finished checkpoint and drop the others."""
    _replace(folder / LATEST, lambda path: path.write_text(json.dumps(marker)))
    for old in folder.glob("step-*"):
        if old.name != marker["folder"]:
            shutil.rmtree(old, ignore_errors=not strict)  # a worker with an old view of worker 0's disk finds it gone


def read(folder: str | Path, *, rank: int, world_size: int, signature: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
    """(step, this worker's state), or None where no save was finished. Raises CheckpointError where it is of another training."""
    found = latest(folder)
    if found is None:
        return None
    if found["world_size"] != world_size:
        raise CheckpointError(
            f"the checkpoint in {folder} was written by {found['world_size']} worker(s), this training has {world_size};"
            f" resume with ray.num_workers={found['world_size']}, or remove the folder to start over"
        )
    if found["signature"] != signature:
        what = ", ".join(f"{k} {found['signature'].get(k)} there, {v} here" for k, v in signature.items() if found["signature"].get(k) != v)
        raise CheckpointError(f"the checkpoint in {folder} is of another training ({what}); remove the folder to start over")
    home = Path(found.get("folder", _home(Path(folder), found["step"]).name)).name  # the name alone: never a folder elsewhere
    path = Path(folder) / home / f"rank-{rank}.pt"
    if not path.exists():
        raise CheckpointError(f"{path} is missing, though {LATEST} names it; every worker must see the same folder")
    try:
        return found["step"], torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} holds something else than tensors and plain values, which is not read because it could run code, or is damaged ({said});"
            " remove the folder to start this training over"
        ) from error


def _home(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _replace(path: Path, write_to) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_to(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
