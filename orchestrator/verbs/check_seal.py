"""The evidence file: one canonical form of its content, a hash over it, and with a key a keyed hash that only who has the key can make.

The hash shows damage; anybody can compute it anew after a change. The keyed hash (HMAC-SHA256, RFC 2104) shows forgery to whoever has the key.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError, SafebasinError
from orchestrator.storage import files, nofollow, paths
from orchestrator.trial import record_check

FILE = "evidence.json"
FORMAT = 1
KEY = "SAFEBASIN_CHECK_KEY"
"""Environment variable that may hold the key."""
LEAST_KEY, MOST_KEY = 16, 4096
"""Bytes."""
MOST_BYTES = 64 << 20
_DICTS = ("model", "untouched", "conditions", "suites", "measured_at", "records", "policy")
_PARTS = {"format", "made_by", "checked_at", "passed", "rules", "seal", *_DICTS}


class Broken(SafebasinError):
    """An evidence file that is not as it was written."""


def key_of(path: str | None) -> bytes | None:
    """The key in a file, else in the environment, line ends at its end left out; None where neither holds one.

    Raises ConfigError for a file that cannot be read and a key that is too short or too long. It is never shown.
    """
    if path is not None:
        try:
            key = nofollow.data_of(paths.expanded(path), MOST_KEY + 2).rstrip(b"\r\n")
        except OSError as error:
            raise ConfigError(f"--key-file {path!r} cannot be read: {error.strerror or error}; give a file that holds the key alone") from error
        source = f"--key-file {path!r}"
    else:
        text = os.environ.get(KEY)
        if text is None:
            return None
        key, source = text.rstrip("\r\n").encode("utf-8", "surrogateescape"), KEY
    if not LEAST_KEY <= len(key) <= MOST_KEY:
        raise ConfigError(f"{source} holds {len(key)} bytes; a key has {LEAST_KEY} to {MOST_KEY:,}, e.g. openssl rand -hex 32")
    return key


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(files.plain(body), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def sealed(body: Mapping[str, Any], key: bytes | None) -> dict[str, Any]:
    """The body with its seal: `sha256` over its canonical form and, with a key, `hmac_sha256` over the same."""
    data = _canonical(body)
    return {**files.plain(body), "seal": {
        "sha256": hashlib.sha256(data).hexdigest(), "hmac_sha256": None if key is None else hmac.new(key, data, hashlib.sha256).hexdigest(),
    }}  # fmt: skip


def written(body: Mapping[str, Any]) -> str:
    """The one text of an evidence file with this content."""
    return json.dumps(body, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def read(path: str | Path, key: bytes | None) -> dict[str, Any]:
    """The content of an evidence file that is as it was written. Raises Broken, saying what is not, ConfigError where there is no file.

    A file that is sealed with a key needs it, and a key given wants a file that is sealed with it.
    """
    if not paths.is_file(path):
        raise ConfigError(f"--verify {str(path)!r} is no file; give the {FILE} that safebasin check wrote")
    body = record_check.read_json(paths.expanded(path))
    if not isinstance(body, dict) or body.get("format") != FORMAT or set(body) != _PARTS or not _whole(body):
        raise Broken(f"{path} is no evidence file of this version, or was changed; let safebasin check write it again")
    rest = {name: value for name, value in body.items() if name != "seal"}
    wanted = sealed(rest, key)
    if body["seal"]["sha256"] != wanted["seal"]["sha256"] or nofollow.data_of(paths.expanded(path), MOST_BYTES) != written(body).encode():
        raise Broken(f"{path} is not as it was written: its hash is of another content; take the original, or let safebasin check write it again")
    marked = body["seal"]["hmac_sha256"]
    if key is None and marked is not None:
        raise Broken(f"{path} is sealed with a key, and none was given, so it may be forged; give --key-file FILE or set {KEY}")
    if key is not None and (not isinstance(marked, str) or not hmac.compare_digest(marked.encode(), wanted["seal"]["hmac_sha256"].encode())):
        how = "sealed without a key" if marked is None else "sealed with another key, or was forged"
        raise Broken(f"{path} is {how}; take one that was written with this key")
    return body


def _whole(body: Mapping[str, Any]) -> bool:
    seal, model = body["seal"], body["model"]
    return (
        all(isinstance(body[name], dict) for name in _DICTS) and isinstance(body["rules"], list) and isinstance(body["passed"], bool)
        and isinstance(seal, dict) and set(seal) == {"sha256", "hmac_sha256"} and isinstance(seal["sha256"], str)
        and isinstance(model.get("files"), dict) and all(isinstance(one, str) for one in model["files"].values())
        and all(isinstance(one, dict) and isinstance(one.get("passed"), bool) and isinstance(one.get("rule"), str) for one in body["rules"])
    )  # fmt: skip
