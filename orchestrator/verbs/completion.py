"""Shell completion, put where shells look for it without changing anything else of the user's: one line is appended to a shell's own file, once.

Typer's installer rewrites `.bashrc` and `.zshrc` whole at every call (blank lines, what another program writes meanwhile, a disk that is
full, a menu style that nobody asked for); this one only ever appends.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from orchestrator.errors import ConfigError, StorageError
from orchestrator.storage import files

SCRIPTS = {"bash": ".bash_completions/{prog}.sh", "zsh": ".zfunc/_{prog}", "fish": ".config/fish/completions/{prog}.fish"}
"""Shell -> the file of ours, below the home folder."""
RC = {"bash": ".bashrc", "zsh": ".zshrc"}
LINES = {"bash": "source '{script}'", "zsh": "fpath+=~/.zfunc; autoload -Uz compinit; compinit"}


def install(shell: str | None = None, prog_name: str | None = None, complete_var: str | None = None) -> tuple[str, Path]:
    """Write the completion script and, for bash and zsh, append the line that loads it where no line of that text is there.

    Raises ConfigError for a shell that is not known or a script of this name that is another program's, StorageError where a file cannot be
    written; the shell's file is then as it was.
    """
    from typer import completion

    shell = shell or completion._get_shell_name()
    if shell not in SCRIPTS:
        raise ConfigError(
            f"completion for the shell {shell!r} cannot be installed (bash, zsh and fish can); `safebasin --show-completion` prints what to load"
        )
    prog = prog_name or "safebasin"
    variable = complete_var or f"_{prog.replace('-', '_').upper()}_COMPLETE"
    text = completion.get_completion_script(prog_name=prog, complete_var=variable, shell=shell) + "\n"
    script = Path.home() / SCRIPTS[shell].format(prog=prog)
    _check_script(script, variable)
    if shell in RC:
        _append(Path.home() / RC[shell], LINES[shell].format(script=script))
    files.write_text(script.resolve(), text)
    return shell, script


def _check_script(script: Path, variable: str) -> None:
    """A file under our script's name is ours where it asks for this program's completion."""
    if not os.path.lexists(script):
        return
    if not script.is_file() or variable not in script.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(f"{script} is there and is no completion of safebasin; move it away, then install again")


def _append(path: Path, line: str) -> None:
    """Add a line at the end of a file, which may be a link, lack a newline at its end, or not be there. Raises StorageError."""
    try:
        before = path.read_bytes() if path.exists() else b""
        if line.encode() in before.splitlines():
            return
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"{path} is no file; add this line to what your shell reads: {line}")
        gap = b"" if not before or before.endswith(b"\n") else b"\n"
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)  # follows a link: dotfiles often are
        try:
            added = gap + line.encode() + b"\n"
            if os.write(handle, added) != len(added):
                os.ftruncate(handle, len(before))
                raise OSError("only a part of the line could be written")
        finally:
            os.close(handle)
    except OSError as error:
        raise StorageError(f"cannot add a line to {path}: {error.strerror or error}; make it writable, or add it yourself: {line}") from error
