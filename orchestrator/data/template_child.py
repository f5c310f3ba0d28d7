"""Renders a chat template in a process of its own that may be killed. Run as a script by `template_limits`; imports nothing but jinja2.

Reads one JSON object from stdin: path (sys.path), template, tokens, cases [{messages, generation, at}], seconds, each, bytes, characters, quiet.
`at`: ISO time that the template is told (now without it). `each`: computing time of one case, at the end of which the process is killed. Writes
one JSON line per case: {"text": ...} (without the text where `quiet`) or {"error": ..., "kind": "template" | "memory" | "size"}; a template that
does not compile gives one line in all.
The environment is that of transformers (`utils/chat_template_utils.py`), which `tests/unit/test_template_limits.py` compares it with.
"""

from __future__ import annotations

import datetime
import json
import resource
import signal
import sys

CLOCK: list[datetime.datetime] = []
"""The time that a case is rendered at, where it names one."""


def limit(seconds: int, size: int) -> None:
    """Computing time and memory of this process; macOS knows no limit of memory and is left with the first."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    if sys.platform != "darwin":
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def environment():
    """Jinja as transformers sets it up for chat templates."""
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}...{% endgeneration %}`, which marks what an assistant wrote and renders as what is in it."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_inner"), [], [], body).set_lineno(line)

        def _inner(self, caller):
            return caller()

    class Names(jinja2.utils.Namespace):
        """A namespace without names that begin with an underscore."""

        def __init__(*args, **kwargs):
            self, args = args[0], args[1:]
            attributes = dict(*args, **kwargs)
            for name in attributes:
                Names.check(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name, value):
            Names.check(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

        @staticmethod
        def check(name):
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace may not have the attribute {name!r}")

    class Dict:
        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args, **kwargs):
            return dict.fromkeys(*args, **kwargs)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception, "strftime_now": lambda form: (CLOCK[0] if CLOCK else datetime.datetime.now()).strftime(form),
        "dict": Dict(), "namespace": Names,
    }  # fmt: skip
    return made


def rendered(template, case: dict, asked: dict) -> dict:
    """One case's line. The text is made piece by piece, so that one without end stops at the limit."""
    pieces, size = [], 0
    CLOCK[:] = [datetime.datetime.fromisoformat(case["at"])] if case.get("at") else []
    signal.setitimer(signal.ITIMER_PROF, asked["each"])
    most = asked["characters"] + 4 * sum(len(message["content"]) for message in case["messages"])
    values = {"messages": case["messages"], "tools": None, "documents": None, "add_generation_prompt": case["generation"], **asked["tokens"]}
    for piece in template.generate(**values):
        size += len(piece)
        if size > most:
            return {"error": f"more than {most:,} characters", "kind": "size"}
        if not asked["quiet"]:
            pieces.append(piece)
    return {"text": "".join(pieces)}


def attempt(function, *arguments):
    """What a function gives, or the line on what it raises: a template is a program and can raise anything."""
    try:
        return function(*arguments)
    except MemoryError:
        return {"error": "more memory than it may have", "kind": "memory"}
    except Exception as error:
        return {"error": in_words(error), "kind": "template"}


WORDS = {
    "RecursionError": "it is nested too deeply, or calls itself without end",
    "ZeroDivisionError": "it divides by zero",
    "OverflowError": "a number or range in it is too large",
    "TemplateSyntaxError": "", "UndefinedError": "it uses what there is not", "SecurityError": "it reaches for what a template may not",
    "TemplateError": "", "TemplateRuntimeError": "", "TemplateAssertionError": "", "TemplateNotFound": "it names another file, which is not read",
}  # fmt: skip
"""What errors mean, in words; empty where the error's own sentence says it."""


def in_words(error):
    """An error of a template as a sentence without names of classes."""
    said, name = " ".join(str(error).split())[:300], type(error).__name__
    line = f" (line {error.lineno} of the template)" if name == "TemplateSyntaxError" else ""
    if "no loader for this environment" in said:
        return "it includes, imports or extends another file, which is not read: a template is one text"
    if name == "RecursionError":
        return WORDS[name]
    said = f"{said}{line}"
    words = WORDS.get(name, "it takes a value for another kind than it is")
    return f"{words}: {said}" if words and said else words or said or "it gives up without a word"


def note_folding() -> list[bool]:
    """Filled where Jinja, working out constants while it compiles, runs out of memory; it swallows that, and where there is no limit it would
    fill the machine."""
    from jinja2 import nodes

    found: list[bool] = []
    kept = nodes.Impossible.__init__

    def noting(self, *arguments):
        if isinstance(sys.exc_info()[1], MemoryError):
            found.append(True)
        kept(self, *arguments)

    nodes.Impossible.__init__ = noting
    return found


def main() -> None:
    """All cases, a line each."""
    asked = json.loads(sys.stdin.buffer.read())
    sys.path[:] = asked["path"]
    made = environment()
    limit(asked["seconds"], asked["bytes"])
    folded = note_folding()
    template = attempt(made.from_string, asked["template"])
    template = {"error": "more memory than it may have", "kind": "memory"} if folded else template
    if isinstance(template, dict):
        print(json.dumps(template), flush=True)
        return
    for case in asked["cases"]:
        print(json.dumps(attempt(rendered, template, case, asked)), flush=True)


if __name__ == "__main__":
    main()
