"""Secrets planted into the environment of a real run, and the search for them in everything the run leaves or shows."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from pathlib import Path

import psutil

from orchestrator.lanes import cluster_folder

SECRETS = {
    "HF_TOKEN": "hf_plantedPlantedPlantedPlanted0001",
    "MLFLOW_TRACKING_USERNAME": "somebody",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-password-0002",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED03",
    "AWS_SECRET_ACCESS_KEY": "planted/aws/secret/access/key/0004",
    "OPENAI_API_KEY": "sk-planted-openai-key-0005-0005",
    "RAY_AUTH_TOKEN": "planted-ray-auth-token-0006-0006-0006-0006",
}
WORDS = {name: value for name, value in SECRETS.items() if not name.endswith("USERNAME")}


class Watched:
    """A finished command: its outcome, every command line its processes had, and the authentication mode Ray's were started in."""

    def __init__(self, command: list[str], *, cwd: Path, environment: dict[str, str], timeout: float):
        self.command_lines: set[str] = set()
        self.modes: set[str | None] = set()
        self._kept = cwd.with_name(f"{cwd.name}-ray")
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.pid, over = process.pid, threading.Event()
        watcher = threading.Thread(target=self._watch, args=(process.pid, over))
        watcher.start()
        try:
            self.stdout, self.stderr = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
        finally:
            over.set()
            watcher.join()
        self.returncode = process.returncode

    def _watch(self, pid: int, over: threading.Event) -> None:
        looked: set[int] = set()
        while not over.wait(0.5):
            self._keep_sessions(pid)
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                        line = " ".join(process.cmdline())
                        self.command_lines.add(line)
                        if "/ray/" in line and process.pid not in looked and process.create_time() < time.time() - 5:
                            looked.add(process.pid)
                            self.modes.add(process.environ().get("RAY_AUTH_MODE"))

    def _keep_sessions(self, pid: int) -> None:
        """A second name for each file below the session folders of its clusters, which are gone at its end; what is written later is in it, too."""
        base = cluster_folder.place()
        for path in base.glob(f"{cluster_folder.PREFIX}*/{cluster_folder.INNER}/session_*_{pid}/**/*"):
            kept = self._kept / Path(*path.relative_to(base).parts[2:])
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                if path.is_file() and not path.is_symlink():
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    os.link(path, kept)

    def ray_sessions(self) -> list[Path]:
        """What the session folders of the clusters it started held; Ray ends their names with the number of the process."""
        return list(self._kept.glob(f"session_*_{self.pid}"))


def found_in(data: bytes) -> list[str]:
    return [name for name, secret in WORDS.items() if secret.encode() in data]


def found_below(*places: Path) -> dict[str, list[str]]:
    """Path -> names of the secrets in it, for every regular file below; none is skipped for its kind."""
    found = {}
    for place in places:
        for path in [place] if place.is_file() else place.rglob("*"):
            if path.is_file() and not path.is_symlink() and (names := found_in(path.read_bytes() + os.fsencode(path))):
                found[str(path)] = names
    return found
