"""`safebasin doctor`: versions, devices, Ray's authentication, disk, and what of a config would not fit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.errors import ConfigError, SafebasinError
from orchestrator.lanes import cluster_reach
from orchestrator.storage import cachedir
from orchestrator.terminal import screen

PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "datasets", "mlflow", "optuna", "pydantic")
LOW_DISK_GIB = 5
LOOPBACK = ("127.0.0.1", "localhost", "::1")
DASHBOARD_PORT = 8265


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    what: str
    state: Literal["ok", "warn", "fail"]
    detail: str


def show(path: str | None, overrides: list[str], as_json: bool = False) -> int:
    """Print the findings; 0 when nothing fails, else 1 (2 where the config itself is wrong)."""
    import dataclasses
    import json

    from orchestrator import config

    experiment = config.load(path, overrides)
    table = screen.Grid(box=None, padding=(0, 2), header_style="bold", pad_edge=False)
    for column in ("what", "state", "detail"):
        table.add_column(column, overflow="fold")
    found = list(examine(experiment))
    style = {"ok": "green", "warn": "yellow", "fail": "red"}
    for finding in found:
        table.add_row(finding.what, screen.styled(finding.state, style[finding.state]), finding.detail)
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in found], indent=2))
    else:
        screen.show(screen.console(), table)
    return 1 if any(finding.state == "fail" for finding in found) else 0


def examine(experiment) -> Iterator[Finding]:
    """All findings, in the order they are printed."""
    yield from _versions()
    yield from _devices(experiment)
    yield from _store(experiment)
    yield from _shared_cache(experiment)
    yield from _disk(experiment)
    yield from _compiler(experiment)
    yield from _ray(experiment)
    yield from _config(experiment)


def _versions() -> Iterator[Finding]:
    yield Finding("python", "ok", platform.python_version())
    for name in PACKAGES:
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "fail", f"not installed; pip install {name} --constraint constraints.txt")


def _devices(experiment) -> Iterator[Finding]:
    import psutil
    import torch

    memory = psutil.virtual_memory()
    yield Finding("cpu", "ok", f"{os.cpu_count()} cores, {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB memory free")
    count, asked = torch.cuda.device_count(), experiment.ray.use_gpu
    if count:
        names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(count)}))
        bf16 = torch.cuda.is_bf16_supported()
        detail = f"{count} x {names}, CUDA {torch.version.cuda}, {'bf16' if bf16 else 'no bf16'}, NCCL"
        if asked and experiment.training.bf16 and not bf16:
            yield Finding("gpu", "warn", f"{detail}; training.bf16=true is emulated there and slow: set it to false")
        else:
            yield Finding("gpu", "ok", detail + ("" if asked else "; left idle, as ray.use_gpu=false"))
    elif not asked:
        yield Finding("gpu", "ok", "none; workers train on CPU with gloo")
    elif _address(experiment):
        yield Finding("gpu", "warn", "none on this machine, but ray.use_gpu=true; fine if the cluster's workers have them")
    else:
        why = "none on this machine" if torch.version.cuda else f"this torch ({torch.__version__}) is built without CUDA"
        yield Finding("gpu", "fail", f"ray.use_gpu=true, but {why}, and no cluster is named; set ray.use_gpu=false, or ray.address")


def _address(experiment) -> str | None:
    return experiment.ray.address or os.environ.get("RAY_ADDRESS")


def _store(experiment) -> Iterator[Finding]:
    """Whether the address that `output.dir` is can be written."""
    if experiment.output_address is None:
        return
    from orchestrator.storage import buckets

    try:
        buckets.open(experiment.output_address).check()
        yield Finding("output.dir", "ok", f"{experiment.output_place} can be written from here; every node needs its credentials")
    except SafebasinError as error:
        yield Finding("output.dir", "fail", str(error))


def _shared_cache(experiment) -> Iterator[Finding]:
    """Whether the cache that machines share can be written."""
    from orchestrator.storage import cache

    try:
        store = cache.opened()
        if store is not None:
            store.check()
            yield Finding("shared cache", "ok", f"{store.shown} can be written from here; export {cache.VARIABLE} on every node")
    except SafebasinError as error:
        yield Finding("shared cache", "fail", str(error))


def _disk(experiment) -> Iterator[Finding]:
    own = "output.dir" if experiment.output_address is None else "its copy here"
    for what, folder in ((own, experiment.output_dir.absolute()), ("cache", cachedir.root())):
        existing = folder
        while not existing.exists():
            existing = existing.parent
        free = shutil.disk_usage(existing).free / 2**30
        writable = os.access(existing, os.W_OK)
        state = "fail" if not writable else "warn" if free < LOW_DISK_GIB else "ok"
        yield Finding(what, state, f"{folder}: {free:.1f} GiB free" + ("" if writable else ", not writable: give a folder you own"))
    shm = Path("/dev/shm")
    if shm.exists():
        size = shutil.disk_usage(shm).free / 2**30
        yield Finding("/dev/shm", "ok" if size >= 1 else "warn", f"{size:.1f} GiB free (Ray's object store lives there)")


def _compiler(experiment) -> Iterator[Finding]:
    if experiment.training.engine != "deepspeed":
        return
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler:
        yield Finding("compiler", "ok", compiler)
    else:
        yield Finding("compiler", "warn", "no C++ compiler; DeepSpeed's compiled ops (CPU offload, fused optimisers) cannot be built")


def _ray(experiment) -> Iterator[Finding]:
    address = _address(experiment)
    if experiment.ray.init_kwargs.get("dashboard_host", "127.0.0.1") not in LOOPBACK:
        host = experiment.ray.init_kwargs["dashboard_host"]
        yield Finding("ray dashboard", "warn", f"ray.init_kwargs.dashboard_host={host}: leave it on 127.0.0.1, forward port 8265 by ssh")
    mode, token = os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not address:
        yield Finding("ray cluster", "ok", "none named: a cluster of this machine is started for the run, with token authentication, on loopback")
        return
    yield _joinable(address)
    has_token = bool(token) or (Path.home() / ".ray" / "auth_token").exists()
    if mode != "token":
        yield Finding("ray auth", "warn", "RAY_AUTH_MODE is not token: who reaches the cluster runs code on it; start it with RAY_AUTH_MODE=token")
    elif not has_token:
        yield Finding("ray auth", "fail", "RAY_AUTH_MODE=token but no token: set RAY_AUTH_TOKEN_PATH or put it into ~/.ray/auth_token")
    else:
        yield Finding("ray auth", "ok", "token")
    yield from _strangers("127.0.0.1" if address == "auto" else address.rpartition("://")[2].rpartition(":")[0] or address)


def _joinable(address: str) -> Finding:
    if address == "auto":
        return Finding("ray cluster", "ok", "joins the one of this machine (auto)")
    try:
        if cluster_reach.listening(address):
            return Finding("ray cluster", "ok", f"joins {address}")
    except ConfigError as error:
        return Finding("ray cluster", "fail", str(error))
    return Finding("ray cluster", "fail", f"nothing answers at {address} (ray.address, or RAY_ADDRESS); start the cluster, or correct the address")


def _strangers(host: str, port: int = DASHBOARD_PORT) -> Iterator[Finding]:
    """Whether the head's dashboard, which takes jobs, lets in who has no token; nothing where none answers there."""
    import urllib.error
    import urllib.request

    url = f"http://{host}:{port}"
    try:
        with urllib.request.urlopen(f"{url}/api/jobs/", timeout=3):
            pass
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            yield Finding("ray dashboard", "ok", f"{url} asks for a token")
        return
    except OSError:
        return
    where = "" if host in LOOPBACK else ", and not only on loopback"
    yield Finding("ray dashboard", "warn", f"{url} takes jobs without a token{where}: start the head with RAY_AUTH_MODE=token")


def _config(experiment) -> Iterator[Finding]:
    from orchestrator.experiment import checks

    try:
        checks.check_combinations(experiment)
    except SafebasinError as error:
        yield Finding("config", "fail", str(error))
        return
    yield Finding("worker", "ok", worker(experiment))
    yield from _lanes(experiment)
    yield from _memory(experiment)
    try:
        found = checks.check(experiment, build_pocket=False)
    except SafebasinError as error:
        yield Finding("config", "fail", str(error))
        return
    yield Finding("config", "ok", f"{experiment.name}: {len(experiment.recipes)} recipes, {experiment.search.trials} trials")
    for warning in found.warnings:
        yield Finding("config", "warn", warning)


def worker(experiment) -> str:
    """What one worker of a lane is given and how it trains, in a sentence."""
    from orchestrator.config import deepspeed

    ray, training, settings = experiment.ray, experiment.training, experiment.deepspeed
    device = f"{ray.gpus_per_worker:g} GPU, " if ray.use_gpu else ""
    how = f"{device}{ray.cpus_per_worker:g} CPU, {'bf16 compute with float32 weights' if training.bf16 else 'float32'}"
    if training.engine == "plain":
        return f"{how}; torch alone"
    names = {"offload_optimizer": "optimizer", "offload_param": "weights"}
    where = [name for key, name in names.items() if deepspeed.offloaded(settings, key)]
    adam = "DeepSpeed's CPU Adam, compiled on first use" if deepspeed.ds_cpu_adam(settings) else "torch's AdamW"
    offload = f", {' and '.join(where)} in host memory" if where else ""
    return f"{how}; {'NCCL' if ray.use_gpu else 'gloo'}, ZeRO stage {experiment.zero_stage}{offload}, {adam}"


def _lanes(experiment) -> Iterator[Finding]:
    from orchestrator.lanes import capacity

    if _address(experiment):
        return
    try:
        yield Finding("lanes", "ok", capacity.plan(experiment, [capacity.this_machine()], experiment.search.trials).sentence)
    except SafebasinError as error:
        yield Finding("lanes", "fail", str(error))


def _memory(experiment) -> Iterator[Finding]:
    """What one worker needs for each recipe; a failure where this machine is the one that trains and has less."""
    import psutil
    import torch

    from orchestrator.config import recipe_items
    from orchestrator.experiment import checks
    from orchestrator.lanes import capacity
    from orchestrator.models import identity
    from orchestrator.trial.engine import memory
    from strategies.base import StrategyError

    here, gpu = not _address(experiment), experiment.ray.use_gpu
    if checks.uses_pocket(experiment) and not checks.pocket_built():
        return  # its model is made by the first run
    together = capacity.places(experiment, capacity.this_machine()) if here else 0
    try:
        needs = [memory.of_experiment(experiment, recipe_items(recipe), identity.shape(experiment.model)) for recipe in experiment.recipes]
    except (SafebasinError, StrategyError) as error:
        yield Finding("memory", "warn", f"not estimated: {error}")
        return
    sentences = [found.sentence(gpu=gpu) for found in needs]
    for sentence in dict.fromkeys(sentences):
        same = [i for i, other in enumerate(sentences) if other == sentence]
        found = needs[same[0]]
        short = []
        if here and gpu and torch.cuda.device_count():
            card = torch.cuda.get_device_properties(0).total_memory
            if found.peak > card * min(1.0, experiment.ray.gpus_per_worker):
                short.append(f"the GPU has {memory.gib(card)}")
        machine = psutil.virtual_memory().total
        if together * (sum(found.host.values()) + (0 if gpu else found.peak)) > machine:
            short.append(f"this machine has {memory.gib(machine)} for {together} of them")
        remedy = f"; {' and '.join(short)}: take lora, a higher ZeRO stage, offload_optimizer or fewer lanes" if short else ""
        names = ", ".join(experiment.recipe_names[i] for i in same)
        yield Finding("memory", "fail" if short else "ok", f"{names}: {sentence}{remedy}")
