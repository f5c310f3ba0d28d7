"""Verbs that measure any finished model: evaluate, compare, basin. Heavy imports only inside verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[str | None, typer.Option("--config", "-c", metavar="FILE", help="YAML file or preset whose suites, judge and task are used; the pocket preset without it.")]  # fmt: skip  # noqa: E501
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for the files; below outputs/ without it.")]
Words = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, e.g. safety.judge=refusal")]
MODEL = "Folder, hub id, `pocket`, or PEFT adapter folder."


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for verb in (evaluate, compare, basin):
        app.command()(verb)


def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    overrides: Words = None,
    baseline: Annotated[str | None, typer.Option(help="The untouched model: gives rises, transitions and a verdict by the limits.")] = None,
    config: Config = None,
    output: Output = None,
    task: Annotated[bool, typer.Option("--task/--no-task", help="Measure the task's metric too, where the config names a task.")] = True,
) -> None:
    """Measure suites, attacks and task of a model, before and after where a baseline is given. Exits with 3 where a limit is not clearly kept."""
    from orchestrator.terminal import screen
    from orchestrator.verbs import evaluate as evaluating
    from orchestrator.verbs import evaluated

    request = evaluated.Request(model, baseline, output, task)
    found = evaluating.evaluate(_settings(config, overrides, model, baseline), request, screen.console())
    raise typer.Exit(found.exit_code)


def compare(
    names: Annotated[list[str], typer.Argument(metavar="A B ... [KEY=VALUE]...", help="Models, evaluation.json files or their folders, output folders of runs; overrides among them.")],  # fmt: skip  # noqa: E501
    baseline: Annotated[str | None, typer.Option(help="What adapter folders are put on; without it their own base.")] = None,
    config: Config = None,
    output: Output = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows of comparison.csv as JSON instead of the table.")] = False,
) -> None:
    """Put several models side by side; what is no finished evaluation or run is evaluated now. Differences are against the first."""
    import json

    from orchestrator.storage import files
    from orchestrator.terminal import screen
    from orchestrator.verbs import compare as comparing

    overrides, chosen = comparing.words(names)
    settings = _settings(config, overrides, chosen[0] if chosen else "pocket", baseline)
    found = comparing.compare(settings, chosen, output or comparing.FOLDER, screen.console(stderr=as_json), baseline)
    if as_json:
        print(json.dumps(files.plain(comparing.rows(found)), indent=2))


def basin(
    model: Annotated[str, typer.Argument(help=MODEL + " Adapters are merged.")],
    overrides: Words = None,
    tuned: Annotated[str | None, typer.Option(help="A model trained from it: the line to it is measured too.")] = None,
    config: Config = None,
    output: Output = None,
    directions: Annotated[int, typer.Option(min=1, help="Random directions.")] = 3,
    points: Annotated[int, typer.Option(min=3, help="Points along each, an odd number.")] = 11,
    alpha: Annotated[float, typer.Option(help="Farthest point, in norms of each tensor.")] = 0.5,
    prompts: Annotated[int, typer.Option(min=1, help="The first so many prompts of the suite.")] = 80,
    suite: Annotated[str | None, typer.Option(help="Harmful suite of the config; the first that constrains without it.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the first direction; the others count on from it.")] = 0,
) -> None:
    """Measure the safety basin: attack success along random directions of the weights, VISAGE score, and the line to a tuned model."""
    from orchestrator.terminal import screen
    from orchestrator.verbs import basin as scanning

    request = scanning.Request(model, tuned, output, directions, points, alpha, prompts, suite, seed)
    scanning.run(_settings(config, overrides, model, None), request, screen.console())


def _settings(path: str | None, overrides: list[str] | None, model: str, baseline: str | None):
    from orchestrator.verbs import opening

    return opening.around(path, overrides or [], model, baseline)
