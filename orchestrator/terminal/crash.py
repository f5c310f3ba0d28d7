"""The end of the command line: whatever is raised becomes one sentence and an exit code; a traceback goes to a file that the sentence names.

`SAFEBASIN_DEBUG=1` shows the traceback on stderr too. Secrets are taken out of both. Knows neither Ray nor MLflow, and is imported early.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import platform
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator import __version__
from orchestrator.errors import SafebasinError
from orchestrator.redaction import REDACTED, is_secret_key, redact_text
from orchestrator.storage import cachedir
from orchestrator.terminal import streams
from orchestrator.texts import clean, one_line

DEBUG = "SAFEBASIN_DEBUG"
_MACHINE = {
    errno.ENOSPC: "a disk is full: free space where the output goes, and where temporary files do",
    errno.EDQUOT: "your disk quota is used up: free space where the output goes, and where temporary files do",
    errno.EIO: "a disk or terminal reports an error: check it",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
    errno.ENOMEM: "this machine's memory is used up: free some, or ask for less",
}
_NETWORK = {"ConnectionError", "ConnectTimeout", "Timeout", "TimeoutError", "HTTPError", "URLError", "ClientError"}
"""Names of what libraries raise where a service is away; they are no common class."""
_place: Path | None = None


class Carried(Exception):
    """An exception that the library of the command line would turn into another one, on its way to `outcome`."""


def carry(call: Callable[[], Any]) -> Any:
    """What `call` returns; Ctrl-C, end of input, a closed pipe and a library's SystemExit as Carried."""
    try:
        return call()
    except (KeyboardInterrupt, EOFError, BrokenPipeError, SystemExit) as error:
        raise Carried from error


def keep_in(folder: Path | None) -> None:
    """Name the folder of the run at hand: a traceback goes there if it is there by then and holds a run of ours, else to the cache folder."""
    global _place
    _place = folder


def outcome(call: Callable[[], Any]) -> int:
    """Exit code of the command line: what `call` returns (None: 0), or that of what it raised, said in a sentence on stderr.

    1 for anything unexpected, 2 for words that cannot be understood, a SafebasinError's own.
    """
    _prepare()
    try:
        code = int(call() or 0)
        sys.stdout.flush()
        return code
    except Carried as error:
        return _ended(error.__cause__ or error)
    except SystemExit as error:  # of the command line's library itself: completions; a closed pipe while help is printed
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        return _ended(error)
    finally:
        streams.settle(sys.stdout)
        streams.settle(sys.stderr)


def _prepare() -> None:
    """Characters that the terminal's encoding lacks are shown by their number; threads, destructors and logging end in sentences too."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open until the process ends
        streams.tolerant(getattr(sys, name))
    if not sys.warnoptions and not os.environ.get(DEBUG):
        for category in (FutureWarning, DeprecationWarning):  # of libraries among themselves: nothing that a user could act on
            warnings.simplefilter("ignore", category)
    threading.excepthook = _in_thread
    sys.unraisablehook = _unraisable
    logging.raiseExceptions = False
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Short())


class _Short(logging.Formatter):
    """Records of libraries without tracebacks: the exception's name and message in the line."""

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return f"({_named(ei[1])})"

    def format(self, record: logging.LogRecord) -> str:
        record.exc_text = None
        return clean(super().format(record))


def _ended(error: BaseException) -> int:
    """Say what ended the command; its exit code."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, SafebasinError):
        error = cause  # Ray wraps what a worker raised, with its traceback
    if isinstance(error, SafebasinError):
        _say(str(error) or type(error).__name__)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        _say("interrupted")
        return 1
    if isinstance(error, BrokenPipeError) and streams.gone(sys.stdout):  # `safebasin list suites | head`
        return 1
    show = getattr(error, "show", None)
    if callable(show) and hasattr(error, "format_message"):  # of the command line's library: an unknown verb or option
        text = io.StringIO()
        show(file=text)
        _write(clean(text.getvalue()).rstrip("\n"))
        return getattr(error, "exit_code", 2)
    _crashed(error, "ended")
    return 1


def _printed(error: BaseException) -> str:
    """str() of an exception; of one that fails even at that, a word."""
    try:
        return str(error)
    except Exception as trouble:
        return f"(its message cannot be printed: {type(trouble).__name__})"


def _crashed(error: BaseException, what: str) -> None:
    """Write the traceback and say in a sentence where it is."""
    try:
        _say(f"{what} with an unexpected {_named(error)}; {_remedy(error)}; {keep(_traceback(error))}")
    except Exception as trouble:  # memory or stack used up once more, while we say so
        _say(f"{what} with an unexpected {type(error).__name__}; its traceback could not be kept ({type(trouble).__name__}), {DEBUG}=1 shows it")
    if os.environ.get(DEBUG, "") not in ("", "0"):
        _write(_without_secrets(_traceback(error)))


def _named(error: BaseException | None) -> str:
    """An exception's type and message, short and without secrets."""
    if isinstance(error, SystemExit):
        return f"SystemExit ({error.code!r}) of a library"
    text = _without_secrets(one_line(_printed(error), 400)) if error is not None else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _remedy(error: BaseException) -> str:
    """What to do about an error that is no sentence of ours."""
    if isinstance(error, MemoryError):
        return "this machine's memory is used up: free some, or ask for less (smaller batches, fewer lanes)"
    if isinstance(error, OSError) and error.errno in _MACHINE:
        return _MACHINE[error.errno]
    if isinstance(error, ImportError):
        return "a package is missing or broken: install again with constraints.txt"
    names = {one.__name__ for one in type(error).__mro__}
    if "OutOfMemoryError" in names:
        return "the GPU's memory is used up: ask for less (smaller batches, fewer lanes), or free some"
    if names & _NETWORK:
        return "a service did not answer: check its address and the network, then try again"
    if isinstance(error, OSError) and error.filename is not None:
        return "check that path: that it is there, and that this user may read and write it"
    return "report it, it is a defect of safebasin or of a library"


def keep(text: str) -> str:
    """Write a traceback to a file that only its owner reads; a clause that says where it is, or why it is nowhere."""
    head = f"safebasin {__version__}, Python {platform.python_version()}, {platform.platform()}\n{chr(10).join(sys.argv)}\n\n"
    body = _without_secrets(head + text).encode(errors="backslashreplace")
    troubles = []
    for folder in _folders():
        try:
            path = _write_new(folder, body)
        except OSError as trouble:
            troubles.append(f"{folder}: {trouble.strerror or trouble}")
            continue
        return f"the traceback is in {path}"
    return f"its traceback could not be kept ({'; '.join(troubles)}), {DEBUG}=1 shows it"


def _folders() -> list[Path]:
    """Where a traceback may go, best first."""
    found = [_place] if _place is not None and (_place / "config.resolved.yaml").is_file() else []
    try:
        found.append(cachedir.root() / "tracebacks")
    except RuntimeError:  # a user without a home folder
        return [*found, Path(tempfile.gettempdir())]
    return [*found, Path(tempfile.gettempdir())]


def _write_new(folder: Path, body: bytes) -> Path:
    """A new file of mode 0600 in the folder, which is made where only the cache lacks it. Raises OSError."""
    if folder.name == "tracebacks":
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    prefix = time.strftime("safebasin-traceback-%Y%m%d-%H%M%S-")
    handle, name = tempfile.mkstemp(prefix=prefix, suffix=".txt", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(body)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _without_secrets(text: str) -> str:
    """Text without secrets, by their form and name, and without the values of environment variables that hold some."""
    text = redact_text(text)
    for name, value in os.environ.items():
        if len(value) >= 8 and is_secret_key(name):
            text = text.replace(value, REDACTED)
    return text


def _in_thread(args: threading.ExceptHookArgs) -> None:
    """An exception that ended a thread, as a sentence and a file."""
    if args.exc_value is None or issubclass(args.exc_type, SystemExit):
        return
    name = args.thread.name if args.thread is not None else "unknown"
    _crashed(args.exc_value, f"the thread {name} ended")


def _unraisable(found: Any) -> None:
    """What was raised where nothing can take it (a destructor, the end of the interpreter)."""
    _say(f"{found.err_msg or 'ignored in'} {getattr(found.object, '__qualname__', type(found.object).__name__)}: {_named(found.exc_value)}")


def _say(sentence: str) -> None:
    _write(f"safebasin: {clean(sentence)}")


def _write(text: str) -> None:
    streams.tell(text, sys.stderr)
