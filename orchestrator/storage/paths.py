"""Texts that may be the name of a file: looked for without the system's complaints about names that cannot be one."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from orchestrator.errors import ConfigError, brief


def expanded(text: str | Path) -> Path:
    """The path with `~` and `~user` replaced; an unknown user's stays as it is written."""
    return Path(os.path.expanduser(text))


def status(text: str | Path) -> os.stat_result | None:
    """What the system says of the path; None where there is nothing that can be reached under it.

    A whole text may be asked: one that is too long, holds a NUL or half a character, runs through a file, round in circles or
    through a folder that is closed to us, is no path of anything here.
    """
    if not str(text):
        return None
    try:
        return os.stat(expanded(text))
    except (OSError, ValueError):  # UnicodeEncodeError (half a character) and an embedded NUL are ValueErrors
        return None


def exists(text: str | Path) -> bool:
    """Whether there is anything under this path."""
    return status(text) is not None


def is_file(text: str | Path) -> bool:
    """Whether this is the path of a plain file."""
    found = status(text)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_folder(text: str | Path) -> bool:
    """Whether this is the path of a folder."""
    found = status(text)
    return found is not None and stat.S_ISDIR(found.st_mode)


def read_text(path: str | Path, what: str, *, most: int) -> str:
    """Text of a UTF-8 file of at most `most` bytes, a byte-order mark left out. Raises ConfigError, beginning with `what`, for a folder, pipe
    or device, a file that cannot be read, is too large or is no UTF-8 text."""
    path = expanded(path)
    found = status(path)
    if found is None:
        raise ConfigError(f"{what} {brief(path)} does not exist or cannot be reached; give the path of a file")
    if not stat.S_ISREG(found.st_mode):
        kind = "folder" if stat.S_ISDIR(found.st_mode) else "pipe, socket or device"
        raise ConfigError(f"{what} {brief(path)} is a {kind}; give the path of a file")
    if found.st_size > most:
        raise ConfigError(f"{what} {brief(path)} has {found.st_size:,} bytes, at most {most:,} are read; give another file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{what} {brief(path)} cannot be read: {error.strerror}; correct its permissions") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = " (it looks like UTF-16)" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ConfigError(f"{what} {brief(path)} is not UTF-8 text{kind}: byte {error.start + 1} is none of it; save it as UTF-8") from error


def folder_name(text: str | Path, what: str) -> str:
    """The name of a folder that is to be made, `~` and `~user` replaced. Raises ConfigError, beginning with `what`, where no folder can have it
    or where it would not be what was meant: control characters, spaces at an end, a user or variable that is not replaced."""
    text = str(text)
    made = os.path.expanduser(text)
    shown = brief(text)
    if not text.strip():
        raise ConfigError(f"{what} is empty; name a folder")
    if re.search(r"[\x00-\x1f\x7f\x85\u2028\u2029]", text):
        raise ConfigError(f"{what}={shown} holds a line break or another control character; take it out")
    if any(part != part.strip() for part in text.split("/")):
        raise ConfigError(f"{what}={shown} has a name in it that begins or ends with a space; take it out")
    if made.startswith("~"):
        user = made.split("/")[0]
        raise ConfigError(f"{what}={shown}: there is no user {user[1:]!r} here; write the whole path, or ./{user} for a folder of this name")
    if found := re.search(r"\$[A-Za-z_]\w*", made):
        raise ConfigError(f"{what}={shown}: {found[0]} is not replaced; write ${{{found[0][1:]}}}")
    longest = max(len(os.fsencode(part)) for part in made.split("/"))
    if longest > 255 or len(os.fsencode(made)) > 4000:
        raise ConfigError(f"{what}={shown} is too long: a name may have 255 bytes, a path 4000; shorten it")
    return made
