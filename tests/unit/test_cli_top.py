"""Whatever reaches the top of the command line is one sentence and an exit code; a traceback lies in a file that only its owner reads."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from orchestrator import cli
from orchestrator.errors import ConfigError, SafebasinError, StorageError
from orchestrator.terminal import crash, screen

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch, tmp_path):
    """Hooks of the process, put back; a cache folder of its own."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
    monkeypatch.setattr(logging.lastResort, "formatter", None)
    monkeypatch.setattr(crash, "_place", None)
    monkeypatch.setenv("SAFEBASIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SAFEBASIN_DEBUG", raising=False)
    with warnings.catch_warnings():
        yield


def ended(error: BaseException, capsys) -> tuple[int, str]:
    """(exit code, what stderr says) of a verb that raises."""

    def verb():
        raise error

    code = crash.outcome(verb)
    return code, capsys.readouterr().err


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no")


CRASHES = [
    KeyError("x"), AssertionError(), RuntimeError("several\nlines\x1b[31m [/b]"), MemoryError(), RecursionError("maximum recursion depth exceeded"),
    UnicodeEncodeError("ascii", "\u00e9", 0, 1, "ordinal not in range"), OSError(28, "No space left on device"), FileNotFoundError(2, "No", "/x"),
    ExceptionGroup("two", [ValueError("a"), KeyError("b")]), SystemError("x" * 5000), Unprintable(), GeneratorExit(), ImportError("No module"),
    TimeoutError("no answer"), ValueError("half \udcff"),
]  # fmt: skip


@pytest.mark.parametrize("error", CRASHES, ids=lambda e: type(e).__name__)
def test_anything_unexpected_is_a_sentence_and_a_file(error, capsys, tmp_path):
    code, told = ended(error, capsys)
    assert code == 1 and told.startswith("safebasin: ended with an unexpected ") and type(error).__name__ in told
    assert told.count("\n") == 1 and len(told) < 1000 and "Traceback" not in told and "\x1b" not in told
    (path,) = (tmp_path / "cache" / "tracebacks").iterdir()
    assert f"the traceback is in {path}" in told and path.stat().st_mode & 0o777 == 0o600
    assert "Traceback (most recent call last)" in path.read_text() and "in verb" in path.read_text()


def test_remedies(capsys):
    class OutOfMemoryError(RuntimeError): ...

    assert "memory is used up" in ended(MemoryError(), capsys)[1] and "GPU's memory" in ended(OutOfMemoryError("CUDA"), capsys)[1]
    assert "a disk is full" in ended(OSError(28, "No space left on device"), capsys)[1]
    assert "did not answer" in ended(ConnectionError("refused"), capsys)[1] and "constraints.txt" in ended(ImportError("x"), capsys)[1]
    assert "check that path" in ended(PermissionError(13, "denied", "/x"), capsys)[1] and "report it" in ended(KeyError("x"), capsys)[1]


def test_errors_of_ours_are_their_sentence(capsys, tmp_path):
    assert ended(ConfigError("a[/b] is no \x1b[31mpath"), capsys) == (2, "safebasin: a[/b] is no \u241b[31mpath\n")
    assert ended(StorageError("two\nlines"), capsys) == (1, "safebasin: two\nlines\n")
    assert ended(SafebasinError(), capsys) == (1, "safebasin: SafebasinError\n")
    remote = RuntimeError("ray::Trial traceback")
    remote.cause = ConfigError("as the worker said")
    assert ended(remote, capsys) == (2, "safebasin: as the worker said\n")
    assert not (tmp_path / "cache").exists()


def test_secrets_stay_out(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "zq81-plain-words")
    monkeypatch.setattr(sys, "argv", ["safebasin", "run", "tracking.password=argumental"])
    error = RuntimeError("GET https://me:geheim@host/x?api_key=abcdef failed with zq81-plain-words and hf_abcdefghijklmnopqrst")
    _, told = ended(error, capsys)
    (path,) = (tmp_path / "cache" / "tracebacks").iterdir()
    for text in (told, path.read_text()):
        assert not re.search("geheim|abcdef|zq81|hf_a|argumental", text) and "***" in text


def test_the_file_lies_with_the_run_where_there_is_one(capsys, tmp_path):
    folder = tmp_path / "out"
    crash.keep_in(folder)
    assert "cache/tracebacks" in ended(KeyError("x"), capsys)[1] and not folder.exists(), "a folder that is not there is not made"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert "cache/tracebacks" in ended(KeyError("x"), capsys)[1] and len(list(folder.iterdir())) == 1, "nor is a stranger's written to"
    (folder / "config.resolved.yaml").write_text("name: x\n")
    assert f"{folder}/safebasin-traceback-" in ended(KeyError("x"), capsys)[1]


def test_without_a_place_for_the_file_it_is_said(capsys, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("SAFEBASIN_CACHE", str(blocked / "cache"))
    monkeypatch.setattr(crash.tempfile, "gettempdir", lambda: str(tmp_path / "nowhere"))
    code, told = ended(KeyError("x"), capsys)
    assert code == 1 and "its traceback could not be kept" in told and "SAFEBASIN_DEBUG=1 shows it" in told
    monkeypatch.setenv("SAFEBASIN_DEBUG", "1")
    assert "Traceback (most recent call last)" in ended(KeyError("x"), capsys)[1]


def test_interrupts_and_codes(capsys):
    assert ended(crash.Carried(), capsys)[0] == 1
    assert ended(KeyboardInterrupt(), capsys) == (1, "safebasin: interrupted\n")
    assert [crash.outcome(lambda code=code: code) for code in (None, 0, 2, 3)] == [0, 0, 2, 3]
    assert ended(SystemExit(0), capsys) == (0, "") and ended(SystemExit(4), capsys)[0] == 4, "of the command line itself: completions"


@pytest.mark.parametrize(("error", "says"), [
    (KeyboardInterrupt(), "safebasin: interrupted\n"), (SystemExit(0), "SystemExit (0) of a library"), (EOFError(), "unexpected EOFError"),
    (KeyError("[/b]"), "unexpected KeyError: '[/b]'"), (ConfigError("no [/b]"), "safebasin: no [/b]\n"),
])  # fmt: skip
def test_through_the_command_line(error, says, capsys, monkeypatch):
    def raises(kind):
        raise error

    from orchestrator.verbs import listing

    monkeypatch.setattr(listing, "show", raises)
    monkeypatch.setattr(sys, "argv", ["safebasin", "list", "suites"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == getattr(error, "exit_code", 1) and says in capsys.readouterr().err, "a library's SystemExit(0) is no success"


@pytest.mark.parametrize("words", [["nope[/b]"], ["run", "--x[/b]"], ["list", "[/b]"], ["render"]])
def test_words_that_cannot_be_understood(words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["safebasin", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.startswith("Usage: ") and "Error: " in told and (words[-1] in told or words == ["render"])


def test_threads_and_destructors_end_in_sentences(capsys, tmp_path):
    class Bad:
        def __del__(self):
            raise ValueError("at the end")

    def verb():
        thread = threading.Thread(target=lambda: {}["gone"], name="safebasin-test")
        thread.start()
        thread.join()
        bad = Bad()
        del bad
        logging.getLogger("some.library").warning("it failed", exc_info=KeyError("inner"))

    assert crash.outcome(verb) == 0
    told = capsys.readouterr().err
    assert "the thread safebasin-test ended with an unexpected KeyError: 'gone'" in told and "ValueError: at the end" in told
    assert "Traceback" not in told and len(list((tmp_path / "cache" / "tracebacks").iterdir())) == 1


def run(code: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=60, env=environment, **options)


PROGRAM = "import sys; sys.argv = ['safebasin', {words}]; from orchestrator.cli import main; main()"


def test_a_reader_that_goes_away_is_no_fault():
    program = PROGRAM.format(words="'config-schema'")
    script = f"{sys.executable} -c \"{program}\" | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], text=True, capture_output=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.stderr, done.stdout) == ("", "1\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_under_the_output(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(words="'list', 'strategies'")], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "a disk is full" in done.stderr


def test_a_run_outlives_its_terminal():
    code = (
        "import sys; from orchestrator.terminal import crash, screen\n"
        "def verb():\n"
        "    console = screen.console(steady=True)\n"
        "    for i in range(3000): screen.say(console, f'trial {i} of a long search', whole=True)\n"
        "    print('at the end', file=sys.stderr); return 0\n"
        "sys.exit(crash.outcome(verb))"
    )
    script = f"{sys.executable} -c \"{code}\" | head -c 10 >/dev/null; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], text=True, capture_output=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout == "0\n" and "at the end" in done.stderr and done.stderr.count("nothing more can be printed") == 1


def test_a_terminal_of_few_characters():
    code = "from orchestrator.terminal import crash, screen; crash.outcome(lambda: screen.say(screen.console(), 'caf\\u00e9 \\udcff [x] \\u2502'))"
    done = run(code, env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "dumb"})
    assert done.returncode == 0 and done.stdout == "caf\\xe9 \\ufffd [x] \\u2502\n" and done.stderr == ""


def test_a_closed_stdout():
    code = "import os, sys; os.close(1); sys.stdout = None; " + PROGRAM.format(words="'version'")
    done = run(code)
    assert done.returncode == 0 and done.stderr == ""


def test_a_steady_console_is_a_stream_like_another():
    assert screen.console(steady=True).encoding and screen.console(steady=True).is_terminal is sys.stdout.isatty()
