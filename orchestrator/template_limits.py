"""Whether a chat template can be used at all, found out where it can do no harm: in a small process with little time and memory.

A template comes with a model or a config and is a program: it may not compile, divide by zero, loop for hours or fill the memory. Nothing
renders one in this process before it has rendered a few conversations there.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import ModelError, brief

SECONDS = 5
"""Computing time for all cases together; a real template takes milliseconds."""
PATIENCE_S = 120
"""Time on the clock, for machines that are busy."""
MEMORY = 2**30
CHARACTERS = 1_000_000
LONGEST = 300_000
"""Longest template."""
QUESTION, ANSWER, SYSTEM = "qxzj question", "qxzk answer", "qxzl system"


def _said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


_TURN = [_said("user", QUESTION), _said("assistant", ANSWER)]
CASES: tuple[dict[str, Any], ...] = (
    {"messages": [_said("user", QUESTION)], "generation": True},
    {"messages": [_said("system", SYSTEM), _said("user", QUESTION)], "generation": True},
    {"messages": _TURN, "generation": False},
    {"messages": [_said("system", SYSTEM), *_TURN], "generation": False},
    {"messages": [*_TURN * 10, _said("user", QUESTION)], "generation": True},
    {"messages": [_said("user", "qxzj " * 4000)], "generation": True},
)
"""A question alone and after a system message, the same with an answer, many turns, a long question."""


def check(template: Any, tokens: Mapping[str, Any], name: str) -> None:
    """Refuse a chat template that cannot be used. `tokens`: the tokenizer's special tokens by name; `name`: whose template it is.

    Raises ModelError where it is no Jinja, fails for every plain question, leaves out what was asked or answered, or takes too much time,
    memory or room. That it refuses some roles or several turns is left to whoever needs them. Of several named templates the default is meant.
    """
    text = template.get("default") if isinstance(template, Mapping) else template
    if not isinstance(text, str):
        raise ModelError(f"the chat template of {brief(name)} is no text and has no template `default`; set model.chat_template")
    if len(text) > LONGEST:
        raise ModelError(f"the chat template of {brief(name)} has {len(text):,} characters, at most {LONGEST:,} are taken; set model.chat_template")
    plain = {key: value for key, value in tokens.items() if isinstance(value, str)}
    fault = _fault(text, json.dumps(plain, sort_keys=True))
    if fault:
        raise ModelError(f"the chat template of {brief(name)} {fault}; correct it, or set model.chat_template to another")


@functools.lru_cache(maxsize=64)
def _fault(template: str, tokens: str) -> str | None:
    """What is wrong with a template, as the second half of a sentence; None for nothing."""
    found = render(template, json.loads(tokens), CASES)
    for kind, told in (("memory", f"takes more than {MEMORY >> 20} MiB"), ("size", f"writes more than {CHARACTERS:,} characters")):
        if any(line.get("kind") == kind for line in found):
            return f"{told} for a short conversation"
    if len(found) == 1 and "error" in found[0]:
        return f"is no Jinja template: {found[0]['error']}"
    if len(found) < len(CASES):
        return f"computes for more than {SECONDS} s on a short conversation"
    questions, answers = found[:2], found[2:4]
    if all("error" in line for line in questions):
        return f"fails for a plain question: {questions[0]['error']}"
    if all("error" in line for line in answers):
        return f"fails for a plain question with its answer: {answers[0]['error']}"
    for lines, mark, what in ((questions, QUESTION, "the user's text"), (answers, QUESTION, "the user's text"), (answers, ANSWER, "the answer")):
        if not any(mark in line.get("text", "") for line in lines):
            return f"leaves out {what}"
    return None


def render(template: str, tokens: Mapping[str, str], cases: Any) -> list[dict[str, str]]:
    """{"text"} or {"error", "kind"} for each case {messages, generation}, as transformers would render it; one error alone where the template
    does not compile, and fewer lines than cases where the time is up. Raises ModelError where no process can be started."""
    asked = {
        "path": sys.path, "template": template, "tokens": dict(tokens), "cases": list(cases), "seconds": SECONDS, "bytes": MEMORY,
        "characters": CHARACTERS,
    }  # fmt: skip
    script = Path(__file__).with_name("template_child.py")
    try:
        ended = subprocess.run(
            [sys.executable, "-I", "-S", str(script)], input=json.dumps(asked).encode(), capture_output=True, timeout=PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        return _lines(error.stdout or b"")
    except OSError as error:
        raise ModelError(f"no process could be started to try the chat template ({error.strerror}); free some memory or processes") from error
    lines = _lines(ended.stdout)
    if ended.returncode > 0 and not lines:
        said = ended.stderr.decode(errors="replace").strip().splitlines()
        if said and said[-1].startswith("MemoryError"):
            return [{"error": "more memory than it may have", "kind": "memory"}]
        raise ModelError(f"the process that tries the chat template failed: {said[-1] if said else f'exit {ended.returncode}'}; report this")
    return lines


def _lines(said: bytes) -> list[dict[str, str]]:
    """The whole lines; the last one may have been cut."""
    return [json.loads(line) for line in said.split(b"\n")[:-1]]
