"""The hub of models and data sets: whether it answers at all, asked once and briefly, before a library tries for minutes.

huggingface_hub repeats a request that fails five times and more, one file after the other: a name with a typo on a machine without network
took minutes to be refused. Nothing here downloads.
"""

from __future__ import annotations

import difflib
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from orchestrator.errors import ModelError, brief
from orchestrator.storage import paths

TIMEOUT_S = 5.0
FRESH_S = 60.0
"""How long an answer holds: a network may come back."""
_known: dict[str, tuple[float, str | None]] = {}


def endpoint() -> str:
    """The hub's address, without a slash at its end (HF_ENDPOINT, else the public one)."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def offline() -> bool:
    """Whether the user forbids asking (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE)."""
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def away() -> str | None:
    """Why the hub cannot be asked, in a few words; None where it answers, with whatever. Takes seconds at most, and asks once a minute."""
    if offline():
        return "HF_HUB_OFFLINE forbids asking the hub"
    where = endpoint()
    at, found = _known.get(where, (float("-inf"), None))
    if time.monotonic() - at > FRESH_S:
        found = _asked(where)
        _known[where] = (time.monotonic(), found)
    return found


def _asked(where: str) -> str | None:
    """One request of one header. In a thread of its own, since looking up a name has no time limit."""
    answer: list[str | None] = []
    asking = threading.Thread(target=lambda: answer.append(_request(where)), daemon=True)
    asking.start()
    asking.join(TIMEOUT_S + 1)
    return answer[0] if answer else f"{where} does not answer within {TIMEOUT_S:g} s"


def _request(where: str) -> str | None:
    try:
        with urllib.request.urlopen(urllib.request.Request(where, method="HEAD"), timeout=TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            return f"{where} answers with an error ({error.code} {error.reason})"  # a proxy's, or its own: the libraries would repeat for minutes
        return None  # somebody answered; what is wrong with the name is said when it is asked for
    except ValueError as error:
        return f"HF_ENDPOINT={where!r} is no address ({error})"
    except OSError as error:
        reason = getattr(error, "reason", error)
        if "CERTIFICATE" in str(reason):
            return None  # the library brings certificates of its own
        return f"{where} cannot be reached ({reason})"


def model(name: str, revision: str | None = None, what: str = "model.model_name_or_path:") -> str:
    """The hub id itself where the hub answers; its folder in the local cache where it does not. Raises ModelError, its sentence beginning with
    `what`, for a name that is no hub id and for one that is neither here nor to be had."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        kept = try_to_load_from_cache(name, "config.json", revision=revision or "main")
    except HFValidationError:
        raise ModelError(f"{what} {brief(name)} is no folder here and no hub id (owner/name of letters, digits, - _ .){near(name)}") from None
    why = away()
    if why is None:
        return name
    if isinstance(kept, str):
        return str(Path(kept).parent)
    raise ModelError(
        f"{what} {brief(name)} is no folder here and not in the local cache, and {why}; check the name and the network (HF_ENDPOINT), or download "
        f"it elsewhere and give the folder{near(name)}"
    )


def near(name: str) -> str:
    """`; did you mean the folder ...?` where folders here are called much like `name`, else an empty text."""
    plain = paths.expanded(urllib.parse.unquote(name))
    if paths.is_folder(plain):
        return f"; did you mean the folder {str(plain)!r} (written without %)?"
    try:
        there = {p.name: p for p in sorted(plain.parent.iterdir()) if p.is_dir() and not p.name.startswith(".")}
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(plain.name, there, n=2, cutoff=0.6)
    return f"; did you mean the folder {' or '.join(repr(str(there[c])) for c in close)}?" if close else ""
