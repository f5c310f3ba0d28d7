"""--install-completion: one line more in the shell's file, once, and every byte that was there stays."""

from __future__ import annotations

import os

import pytest
import typer.completion
from typer.testing import CliRunner

from orchestrator import cli
from orchestrator.errors import ConfigError, StorageError
from orchestrator.verbs import completion

RC = {"bash": ".bashrc", "zsh": ".zshrc"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("before", [b"", b"alias a=b\n", b"no newline", b"\n\n  # \xff\xfe no UTF-8\n\n\n", None])
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_shells_file_gets_one_line_and_keeps_every_byte(home, shell, before):
    rc = home / RC[shell]
    if before is not None:
        rc.write_bytes(before)
    for _ in range(3):
        completion.install(shell)
    after = rc.read_bytes()
    assert after.startswith(before or b"")
    added = after[len(before or b"") :].lstrip(b"\n").splitlines()
    assert len(added) == 1 and (b"safebasin" in added[0] or b".zfunc" in added[0])
    assert after.count(b"\n") == (before or b"").count(b"\n") + 1 + (before == b"no newline")


def test_a_linked_rc_file_stays_a_link(home):
    (home / "dotfiles").mkdir()
    (home / "dotfiles" / "rc").write_text("mine\n")
    (home / ".bashrc").symlink_to(home / "dotfiles" / "rc")
    completion.install("bash")
    assert (home / ".bashrc").is_symlink() and (home / "dotfiles" / "rc").read_text().startswith("mine\nsource ")


def test_another_programs_script_is_not_replaced(home):
    (home / ".zfunc").mkdir()
    (home / ".zfunc" / "_safebasin").write_text("somebody else's")
    with pytest.raises(ConfigError, match="no completion of safebasin; move it away"):
        completion.install("zsh")
    assert (home / ".zfunc" / "_safebasin").read_text() == "somebody else's" and not (home / ".zshrc").exists()


def test_a_file_that_cannot_be_written_is_one_sentence_and_stays(home, monkeypatch):
    (home / ".bashrc").write_text("mine\n")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(completion.os, "open", refuse)
    with pytest.raises(StorageError, match=r"cannot add a line to .*\.bashrc: Permission denied; make it writable, or add it yourself: source"):
        completion.install("bash")
    assert (home / ".bashrc").read_text() == "mine\n" and os.listdir(home) == [".bashrc"]


def test_the_option_uses_it(home, monkeypatch):
    assert typer.completion.install is completion.install
    monkeypatch.setattr(typer.completion, "_get_shell_name", lambda: "bash")
    found = CliRunner().invoke(cli.app, ["--install-completion"], prog_name="safebasin")
    assert found.exit_code == 0 and "bash completion installed" in found.output, found.output
    assert (home / ".bashrc").read_text() == f"source '{home}/.bash_completions/safebasin.sh'\n"
    assert "_SAFEBASIN_COMPLETE" in (home / ".bash_completions" / "safebasin.sh").read_text()
