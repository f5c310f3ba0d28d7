"""Verbs that decide on what was measured: check. Heavy imports only inside verbs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for verb in (check,):
        app.command()(verb)


def check(
    target: Annotated[str | None, typer.Argument(metavar="[DIR|MODEL]", help="Folder of a run or an evaluation, or of a model in one; with --verify the model.")] = None,  # fmt: skip  # noqa: E501
    policy: Annotated[str | None, typer.Option("--policy", metavar="FILE", help="The rules, as YAML; see docs/check.md.")] = None,
    evidence: Annotated[str | None, typer.Option("--evidence", metavar="DIR", help="Where the evidence of MODEL lies, if not beside it.")] = None,
    base: Annotated[str | None, typer.Option(help="What an adapter is put on, where its own name of it leads nowhere here.")] = None,
    verify: Annotated[str | None, typer.Option("--verify", metavar="FILE", help="Look an evidence file over instead: its hash, and what is named beside it.")] = None,  # fmt: skip  # noqa: E501
    key_file: Annotated[str | None, typer.Option("--key-file", metavar="FILE", help="Key that seals the evidence file; else the variable SAFEBASIN_CHECK_KEY.")] = None,  # fmt: skip  # noqa: E501
    register: Annotated[str | None, typer.Option("--register", metavar="NAME", help="On a pass, make the model a version of NAME in MLflow's registry and point the alias safe-best to it.")] = None,  # fmt: skip  # noqa: E501
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for evidence.json; below outputs/ without it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier evidence.json there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the evidence instead of the table.")] = False,
) -> None:
    """The release gate: hold a policy against measured evidence, or verify what an earlier check wrote. Exits with 1 where a rule is not kept."""
    from orchestrator.errors import ConfigError
    from orchestrator.verbs import check as checking
    from orchestrator.verbs import check_seal

    key = check_seal.key_of(key_file)
    if verify is not None:
        if register is not None or output is not None:
            raise ConfigError("--verify looks an evidence file over and writes nothing; leave --register and -o out, or --verify")
        request = checking.Request(target or "", policy or "", evidence, base)
        raise typer.Exit(_verified(verify, checking.verify(verify, request, target, key), as_json))
    if target is None or policy is None:
        raise ConfigError("check needs what is to be released and the rules: safebasin check DIR --policy FILE")
    _check(checking.Request(target, policy, evidence, base, output, overwrite, key), register, as_json)


def _check(request, registered: str | None, as_json: bool) -> None:
    from orchestrator.terminal import screen
    from orchestrator.verbs import check as checking
    from orchestrator.verbs import check_seal

    if registered is not None:
        checking.check_register(registered)
    checking.check_output(request)
    made = checking.check(request)
    console = screen.console(stderr=as_json)
    path = checking.write(made, request.folder)
    if as_json:
        sys.stdout.write(check_seal.written(made.body))
    else:
        checking.show(made.findings, console)
        for line in checking.conditions(made):
            screen.say(console, line)
    screen.say(console, f"evidence: {path}", whole=True)
    screen.say(console, checking.sentence(made), "bold green" if made.passed else "bold red")
    if registered is not None:
        screen.say(console, checking.register(made, registered, path))
    raise typer.Exit(0 if made.passed else 1)


def _verified(file: str, found, as_json: bool) -> int:
    import json

    from orchestrator.terminal import screen

    if as_json:
        print(json.dumps({"file": file, "passed": not found.trouble, "trouble": found.trouble, "notes": found.notes}, indent=2))
        return 1 if found.trouble else 0
    console = screen.console()
    for line in found.notes:
        screen.say(console, f"note: {line}")
    for line in found.trouble:
        screen.say(console, line, "red")
    name, checked = found.body["model"]["name"], found.body["checked_at"]
    good = f"VERIFIED: {name}, checked {checked}, passed {len(found.body['rules'])} rules"
    screen.say(console, good if not found.trouble else f"NOT VERIFIED: {file}", "bold red" if found.trouble else "bold green")
    return 1 if found.trouble else 0
