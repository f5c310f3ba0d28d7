"""Secrets in texts and settings: what reads like one, and copies without them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "***"

_SECRET_WORDS = {
    "token",
    "secret",
    "password",
    "passwd",
    "passphrase",
    "pwd",
    "credential",
    "credentials",
    "authorization",
    "bearer",
    "cookie",
}
_SECRET_PAIRS = (
    {"api", "key"},
    {"access", "key"},
    {"private", "key"},
    {"account", "key"},
    {"secret", "key"},
    {"session", "key"},
    {"sas", "key"},
)
_TOKENIZER_WORDS = {"pad", "eos", "bos", "unk", "sep", "cls", "mask", "id", "ids"}  # `pad_token` is no secret
_SECRET_VALUES = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|glpat-[\w-]{16,}|AKIA[A-Z0-9]{16}|dapi[0-9a-f]{32})\b"
)
# every pattern takes time in proportion to the text, whatever the text: chat templates of 100,000 characters go through them
_URI_PASSWORD = re.compile(r"(://[^\s/:@'\"]*):([^\s/@'\"]+)@")
_QUERY_VALUE = re.compile(r"([?&;]([\w-]+)=)[^&;\s'\"]+")
_QUERY_SECRET = re.compile(r"token|secret|password|passwd|pwd|signature|sig|api_?key", re.IGNORECASE)
_BEARER = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{12,}")
_SETTING_LINE = re.compile(r"^([ \t]*(?:- )?[\"']?)([\w.-]+)([\"']?[ \t]*[:=][ \t]*)(\S.*)$", re.MULTILINE)


def is_secret_key(key: str) -> bool:
    """Whether a config key or environment variable of this name holds a secret (`HF_TOKEN`, `dbPassword`, `aws_secret_access_key`).

    `max_new_tokens` and `pad_token` do not.
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(key)).lower()
    words = {word for word in re.split(r"[^a-z0-9]+", spaced) if word}
    if words & {"apikey", "accesskey", "secretkey", "privatekey"} or any(pair <= words for pair in _SECRET_PAIRS):
        return True
    found = words & _SECRET_WORDS
    return bool(found) and not (found == {"token"} and words & _TOKENIZER_WORDS)


def redact_uri(text: str) -> str:
    """Text with passwords in URIs, secret query values, bearer headers and well-known token forms replaced by ***."""
    text = _URI_PASSWORD.sub(rf"\1:{REDACTED}@", text)
    text = _QUERY_VALUE.sub(lambda match: match[1] + REDACTED if _QUERY_SECRET.search(match[2]) else match[0], text)
    text = _BEARER.sub(rf"\1 {REDACTED}", text)
    return _SECRET_VALUES.sub(REDACTED, text)


def redact(value: Any) -> Any:
    """A copy of nested dicts and lists with secrets replaced by ***: by the name of their key, or by their form."""
    if isinstance(value, Mapping):
        return {k: REDACTED if is_secret_key(str(k)) and v not in (None, "") else redact(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    return redact_uri(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """Text of a config, log or report with secrets replaced: `key: value` and `key=value` lines by key, the rest by form."""

    def line(match: re.Match[str]) -> str:
        value = match[4].rstrip(" \t").removesuffix(",").rstrip(" \t")
        if not is_secret_key(match[2]) or value in ("", "null", "''", '""', "{", "["):
            return match[0]
        quote = value[0] if value[0] in "'\"" else ""
        return f"{match[1]}{match[2]}{match[3]}{quote}{REDACTED}{quote}{match[4][len(value):]}"

    return redact_uri(_SETTING_LINE.sub(line, text))


def find_secret(value: Any, key: str = "") -> tuple[str, str] | None:
    """(dotted key, the text without its secret) of the first secret in nested dicts and lists, None where there is none.

    By form anywhere; by the name of its key where that names no place a secret is read from (`api_key_env`) and no column of the data (`where`).
    """
    if isinstance(value, Mapping):
        parts = [(f"{key}.{name}" if key else str(name), item) for name, item in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [(f"{key}.{number}", item) for number, item in enumerate(value)]
    elif isinstance(value, str):
        name = key.rsplit(".", 1)[-1]
        by_name = is_secret_key(name) and not name.endswith("_env") and ".where." not in key and value not in ("", REDACTED)
        return (key, REDACTED) if by_name else (key, redact_uri(value)) if redact_uri(value) != value else None
    else:
        return None
    return next((found for name, item in parts if (found := find_secret(item, name)) is not None), None)
