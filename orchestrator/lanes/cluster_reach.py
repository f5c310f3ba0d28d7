"""Whether a Ray cluster answers at an address, found out in seconds: Ray itself would try for a quarter of an hour.

The last step asks in a process of its own, because Ray's client can neither be interrupted nor be kept from ending the process it is in.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from orchestrator.errors import ConfigError

PATIENCE_S = 15.0
"""For a head that is just coming up."""
ANSWER_S = 15.0
"""For the cluster's own answer."""
_ASK = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1]).internal_kv_get(b'safebasin', None)"
_HOW = "see ray.address (RAY_ADDRESS is read too), or leave both out to start a cluster on this machine"


def check(address: str, say: Callable[[str], None] = lambda _: None, patience: float = PATIENCE_S) -> None:
    """Raises ConfigError, with the address and the remedy, where no Ray cluster answers there within about 30 s."""
    host, port = _parts(address)
    shown = f"the Ray cluster at {address}"
    until, told = time.monotonic() + patience, False
    while (reason := _refused(host, port)) is not None:
        if time.monotonic() >= until or "name" in reason:
            raise ConfigError(f"{shown} cannot be reached: {reason}; start it, or correct the address; {_HOW}")
        if not told:
            say(f"waiting up to {patience:g} s for {shown}: {reason}")
            told = True
        time.sleep(1.0)
    process = subprocess.Popen([sys.executable, "-c", _ASK, f"{host}:{port}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate(timeout=ANSWER_S + patience)
    except subprocess.TimeoutExpired:
        process.kill()
        _, said = process.communicate()
    if process.returncode == 0:
        return
    if re.search("InvalidAuthToken|AuthenticationError|Unauthenticated", said):
        raise ConfigError(
            f"{shown} asks for a token, and ours is missing or wrong: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or ~/.ray/auth_token) to its token"
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    why = lines[-1][:200] if lines and process.returncode != -9 else "no answer"
    raise ConfigError(f"what answers at {address} is no Ray cluster, or not a healthy one ({why}); give the head's port, 6379 unless set; {_HOW}")


def listening(address: str, timeout: float = 2.0) -> bool:
    """Whether anything takes connections at `host:port`."""
    host, port = _parts(address)
    return _refused(host, port, timeout) is None


def _parts(address: str) -> tuple[str, int]:
    found = re.fullmatch(r"\[?([^\[\]/@\s]+?)\]?:(\d{1,5})", address.strip())
    if re.match(r"https?://", address):
        raise ConfigError(
            f"ray.address={address} is a dashboard's address, which `safebasin submit --address` takes; to join a cluster give HOST:6379, or "
            "ray.address=auto on one of its machines"
        )
    if found is None or not 0 < int(found[2]) < 65536:
        raise ConfigError(f"ray.address={address!r} is no address of a Ray cluster; give HOST:PORT (the head's port is 6379 unless set), or auto")
    return found[1], int(found[2])


def _refused(host: str, port: int, timeout: float = 5.0) -> str | None:
    try:
        with socket.create_connection((host, port), timeout):
            return None
    except socket.gaierror as error:
        return f"the name {host!r} is not known ({error.strerror})"
    except TimeoutError:
        return "no answer"
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error)
