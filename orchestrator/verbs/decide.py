"""Verbs for deciding: check, status, report, init, recommend. Heavy imports only inside verbs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for verb in (check, status, report, init, recommend):
        app.command()(verb)


Risk = Annotated[str | None, typer.Option("--risk", metavar="high|medium|experimental", help="high: health, finance, law; medium: customer service, education.")]  # fmt: skip  # noqa: E501
Gpus = Annotated[int | None, typer.Option("--gpus", min=0, help="GPUs there are.")]
Harmful = Annotated[bool | None, typer.Option("--harmful-answers/--no-harmful-answers", help="Whether the safety rows have harmful answers too (a column `rejected`).")]  # fmt: skip  # noqa: E501
Api = Annotated[bool, typer.Option("--api", help="The model is behind an API: its weights are not to be had.")]


def recommend(
    risk: Risk = None,
    gpus: Gpus = None,
    safety: Annotated[bool | None, typer.Option("--safety-data/--no-safety-data", help="Whether there are safety rows.")] = None,
    harmful: Harmful = None,
    unaligned: Annotated[bool | None, typer.Option("--base-model/--no-base-model", help="Whether there is the model before its alignment.")] = None,
    api: Api = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of sentences.")] = False,
) -> None:
    """Which recipes to search, by risk and by what there is, with the reasons; asks on a terminal for what no flag says."""
    import dataclasses
    import json

    from orchestrator.terminal import screen
    from orchestrator.verbs import recommend as recommending

    advice = recommending.advise(_situation(risk, gpus, safety, harmful, unaligned, api))
    if as_json:
        print(json.dumps(dataclasses.asdict(advice), indent=2))
        return
    for line in recommending.lines(advice):
        screen.say(screen.console(), line)


def init(
    model: Annotated[str | None, typer.Option(help="Folder or hub id of the model to tune.")] = None,
    task: Annotated[str | None, typer.Option(help="Training rows: a file or a `datasets` name.")] = None,
    safety: Annotated[str | None, typer.Option(help="Safety rows, a file; none without it.")] = None,
    unaligned: Annotated[str | None, typer.Option(help="The model before its alignment.")] = None,
    risk: Risk = None,
    gpus: Gpus = None,
    harmful: Harmful = None,
    api: Api = False,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write; never one that is there.")] = Path("job.yaml"),
) -> None:
    """Write a config to start from, with the reason beside each choice; asks on a terminal for what no flag says."""
    from orchestrator.terminal import screen
    from orchestrator.verbs import init as writing

    model = _asked(model, "--model", "Model to tune (folder or hub id)")
    task = _asked(task, "--task", "Training rows (file)")
    if safety is None and _interactive():
        safety = typer.prompt("Safety rows (file; empty for none)", default="", show_default=False) or None
    if unaligned is None and not api and _interactive():
        unaligned = typer.prompt("Model before its alignment (empty for none)", default="", show_default=False) or None
    situation = _situation(risk, gpus, safety is not None, harmful, unaligned is not None, api)
    path = writing.write(writing.Request(situation, model, task, safety, unaligned), output)
    screen.say(screen.console(), f"{path}: next, safebasin validate -c {path}", whole=True)


def _interactive() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _asked(value: str | None, flag: str, question: str) -> str:
    from orchestrator.errors import ConfigError

    if value is None and not _interactive():
        raise ConfigError(f"{flag} is wanted, and there is no terminal to ask on; give {flag} ...")
    return value if value is not None else str(typer.prompt(question))


def _situation(risk: str | None, gpus: int | None, safety: bool | None, harmful: bool | None, unaligned: bool | None, api: bool):
    """What no flag says is asked on a terminal; elsewhere it is medium risk, no GPU and no such data."""
    from orchestrator.errors import UnknownNameError
    from orchestrator.verbs import recommend as recommending

    asking = _interactive()
    if risk is None:
        told = ", ".join(f"{name} ({what})" for name, what in recommending.RISKS.items())
        risk = str(typer.prompt(f"Risk: {told}", default="medium")) if asking else "medium"
    if risk not in recommending.RISKS:
        raise UnknownNameError("risk", risk, recommending.RISKS)
    if gpus is None:
        gpus = int(typer.prompt("GPUs", default=0, type=int)) if asking else 0
    if safety is None:
        safety = asking and typer.confirm("Are there safety rows (harmful prompts with safe answers)?")
    if harmful is None:
        harmful = bool(safety and asking and typer.confirm("Do they have harmful answers too?"))
    if unaligned is None:
        unaligned = bool(asking and not api and typer.confirm("Is there the model before its alignment?"))
    return recommending.Situation(risk, gpus, safety, harmful, unaligned, api)


def status(
    place: Annotated[str, typer.Argument(metavar="DIR|URI", help="Output folder or address of a run, also of one that goes on.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of sentences.")] = False,
) -> None:
    """How far a run is: trials done, the best so far, whether anybody drives it. Nothing of it is touched."""
    import json

    from orchestrator.terminal import screen
    from orchestrator.verbs import status as looking

    found = looking.look(place)
    if as_json:
        print(json.dumps(looking.plain(found), indent=2))
        return
    for line in looking.lines(found):
        screen.say(screen.console(), line)


def report(
    names: Annotated[list[str], typer.Argument(metavar="DIR|URI ... [safety.limits.KEY=VALUE]...", help="Runs; other limits among them.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for the files; below outputs/ without it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier report there.")] = False,
) -> None:
    """Write a run's report anew from its records, under its own limits or others, or one page of several runs."""
    from orchestrator.storage import paths
    from orchestrator.terminal import screen
    from orchestrator.verbs import reporting

    overrides = [word for word in names if "=" in word and not paths.exists(word)]
    read, written = reporting.write([word for word in names if word not in overrides], overrides, output, overwrite)
    console = screen.console()
    for one in read:
        for line in one.found.troubles:
            screen.say(console, f"warning: {line}", "yellow")
        screen.say(console, one.sentence if len(read) == 1 else f"{one.name}: {one.sentence}")
    screen.say(console, str(written[0]), whole=True)


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
