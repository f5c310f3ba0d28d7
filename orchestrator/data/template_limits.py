"""Whether a chat template can be used at all, found out where it can do no harm: in a small process with little time and memory.

A template comes with a model or a config and is a program: it may not compile, divide by zero, loop for hours or fill the memory. Nothing
renders one in this process before it has rendered a few conversations there.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.data import template_child
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


WORDS = "Begin-qxzb {n}, it's \"a\" <b> & C:  {filler} middle-qxzm {n} ÄÖ {filler} end-qxze {n}."
"""Of a long text: what a template cuts, replaces, escapes or writes in other letters shows in it."""


def _long(n: int, filler: int = 2500) -> str:
    return WORDS.format(n=n, filler=(("Filler of some words, " * 40 + "\n") * (filler // 900 + 1))[:filler])


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
LONG: tuple[dict[str, Any], ...] = (
    {"messages": [_said("user", _long(1, 60_000))], "generation": True},
    {"messages": [_said("system", _long(0)), _said("user", _long(1))], "generation": True},
    {"messages": [_said("user", _long(1, 60_000)), _said("assistant", _long(2, 60_000))], "generation": False},
    {"messages": [_said(role, _long(n)) for n, role in enumerate(("user", "assistant") * 3)], "generation": False},
    {"messages": [_said(role, _long(n)) for n, role in enumerate((*("user", "assistant") * 3, "user"))], "generation": True},
)
"""Long texts, of one turn and of several: every one must arrive whole."""
TIMES = ("2024-03-05T12:00:00.000000", "2024-03-05T12:00:01.700001", "2025-11-16T12:00:00.000000")
CLOCKS: tuple[dict[str, Any], ...] = tuple({"messages": _TURN[:1], "generation": True, "at": at} for at in TIMES)
"""The same question a second and some months later."""


def lost(messages: Sequence[Mapping[str, str]], text: str) -> Mapping[str, str] | None:
    """The first message whose text does not stand whole in `text`, but for blanks at its ends or as JSON writes it. Thinking in answers may be
    taken out (`<think>`), so that answers with such marks are not looked at."""
    for message in messages:
        wanted = message["content"].strip()
        if wanted in text or (message["role"] == "assistant" and "think>" in wanted):
            continue
        if not any(json.dumps(form, ensure_ascii=ascii)[1:-1] in text for form in (wanted, message["content"]) for ascii in (False, True)):
            return message
    return None


def check(template: Any, tokens: Mapping[str, Any], name: str) -> None:
    """Refuse a chat template that cannot be used. `tokens`: the tokenizer's special tokens by name; `name`: whose template it is.

    Raises ModelError where it is no Jinja, fails for every plain question, leaves out, cuts or changes what was asked or answered, writes the
    time of day or something random, or takes too much time, memory or room. That it refuses some roles or several turns is left to whoever
    needs them. Of several named templates the default is meant.
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
    found = render(template, json.loads(tokens), (*CASES, *LONG, *CLOCKS))
    for kind, told in (("memory", f"takes more than {MEMORY >> 20} MiB"), ("size", f"writes more than {CHARACTERS:,} characters")):
        if any(line.get("kind") == kind for line in found):
            return f"{told} for a short conversation"
    if len(found) == 1 and "error" in found[0]:
        return f"is no Jinja template: {found[0]['error']}"
    if len(found) < len(CASES) + len(LONG) + len(CLOCKS):
        return f"computes for more than {SECONDS} s on a short conversation"
    questions, answers = found[:2], found[2:4]
    if all("error" in line for line in questions):
        return f"fails for a plain question: {questions[0]['error']}"
    if all("error" in line for line in answers):
        return f"fails for a plain question with its answer: {answers[0]['error']}"
    for lines, mark, what in ((questions, QUESTION, "the user's text"), (answers, QUESTION, "the user's text"), (answers, ANSWER, "the answer")):
        if not any(mark in line.get("text", "") for line in lines):
            return f"leaves out {what}"
    return _changed(found[len(CASES) : -len(CLOCKS)]) or _moving(template, found[-len(CLOCKS) :])


def _changed(found: Sequence[Mapping[str, str]]) -> str | None:
    """Whether long texts arrive whole, wherever the template takes the roles at all."""
    for case, line in zip(LONG, found, strict=True):
        text = line.get("text")
        if text is None:
            continue
        ours = [message for message in case["messages"] if message["role"] != "system" or "Begin-qxzb 0" in text]
        message = lost(ours, text)
        if message is not None:
            whose = {"user": "the user's text", "assistant": "the answer"}.get(message["role"], "the system message")
            several = f" in a conversation of {len(case['messages'])} messages" if len(case["messages"]) > 2 else ""
            gone = [
                part for part, mark in (("beginning", "Begin-qxzb"), ("middle", "middle-qxzm"), ("end", "end-qxze"))
                if f"{mark} {message['content'].partition('qxzb ')[2].partition(',')[0]}" not in text
            ]  # fmt: skip
            what = "its " + ", ".join(gone) + (" is" if len(gone) == 1 else " are") + " lost" if gone else "characters of it become others"
            return f"cuts or changes texts: of {whose}{several} {what}, so that something else would be asked and learnt than the rows say"
    return None


def _moving(template: str, found: Sequence[Mapping[str, str]]) -> str | None:
    if shape(template).random:
        return "draws at random, so that the same prompt is another text each time; take it out"
    texts = [line.get("text") for line in found]
    if texts[0] != texts[1]:
        return "writes the time of day, so that the same prompt is another text a second later and nothing can be compared; take it out"
    return None


def notes(template: Any, tokens: Mapping[str, Any]) -> list[str]:
    """Warnings on a template that `check` takes: that it writes the date."""
    text = template.get("default") if isinstance(template, Mapping) else template
    if not isinstance(text, str) or "strftime_now" not in text:
        return []
    plain = {key: value for key, value in tokens.items() if isinstance(value, str)}
    texts = [line.get("text") for line in render(text, plain, CLOCKS)]
    if len(set(texts)) < 2:
        return []
    return ["the chat template writes the date: the same prompt is another text on another day, so results of different days differ by it; "
            "set model.chat_template to one with a fixed date"]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What a template's text tells without rendering it."""

    bounded: bool
    """It can only walk through its messages and put texts together: no data can make it compute for long."""
    random: bool
    """It draws at random."""


@functools.lru_cache(maxsize=64)
def shape(template: str) -> Shape:
    """Shape of a template. One that does not parse is not bounded."""
    import jinja2
    from jinja2 import nodes

    plain = template_child.environment()
    try:
        tree = plain.parse(template)
        filters = {node.name for node in tree.find_all(nodes.Filter)}
        names = {node.name for node in tree.find_all(nodes.Name)}
        light = _light(tree)
    except (jinja2.TemplateError, RecursionError):
        return Shape(bounded=False, random=False)
    return Shape(bounded=light and len(template) < 20_000, random="random" in filters or "lipsum" in names)


def _light(tree: Any) -> bool:
    """No loop in a loop, nothing that multiplies, and no text that is made of itself."""
    from jinja2 import nodes

    if next(tree.find_all((nodes.Mul, nodes.Pow, nodes.Macro, nodes.CallBlock, nodes.AssignBlock, nodes.Include, nodes.Import, nodes.Extends)), None):
        return False
    if any(node.recursive or next(node.find_all(nodes.For), None) for node in tree.find_all(nodes.For)):
        return False
    if any(next(node.node.find_all((nodes.Concat, nodes.Add)), None) or isinstance(node.node, nodes.Concat | nodes.Add)
           for node in tree.find_all(nodes.Assign)):  # fmt: skip
        return False
    if any(not isinstance(node.left, nodes.Getattr) or getattr(node.left.node, "name", "") != "loop" for node in tree.find_all(nodes.Mod)):
        return False  # `%` of a text writes numbers as wide as it says
    if any(node.name not in _FILTERS or (node.name == "tojson" and (node.args or node.kwargs)) for node in tree.find_all(nodes.Filter)):
        return False
    called = (node.node for node in tree.find_all(nodes.Call))
    return all((node.attr if isinstance(node, nodes.Getattr) else getattr(node, "name", "?")) in _CALLS for node in called)


_FILTERS = {"trim", "length", "count", "default", "d", "upper", "lower", "title", "string", "first", "last", "tojson", "safe"}
_CALLS = {"raise_exception", "strftime_now", "namespace", "startswith", "endswith", "strip", "lstrip", "rstrip"}


def render(template: str, tokens: Mapping[str, str], cases: Any, *, seconds: float | None = None, quiet: bool = False) -> list[dict[str, str]]:
    """{"text"} or {"error", "kind"} for each case {messages, generation}, as transformers would render it; one error alone where the template
    does not compile, and fewer lines than cases where the time is up. seconds: computing time for all, SECONDS without it; one case has at most
    SECONDS. quiet: without the texts. Raises ModelError where no process can be started."""
    seconds = SECONDS if seconds is None else seconds
    asked = {
        "path": sys.path, "template": template, "tokens": dict(tokens), "cases": list(cases), "seconds": math.ceil(seconds),
        "each": SECONDS, "bytes": MEMORY, "characters": CHARACTERS, "quiet": quiet,
    }  # fmt: skip
    script = Path(__file__).with_name("template_child.py")
    try:
        ended = subprocess.run(
            [sys.executable, "-I", "-S", str(script)], input=json.dumps(asked).encode(), capture_output=True, check=False,
            timeout=PATIENCE_S + 10 * (seconds - SECONDS),
        )  # fmt: skip
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
