"""Verbs of `safebasin`: parse, call one function, print. Heavy imports only inside verbs.

Exit codes: 0 a feasible model was found, 2 the request cannot work, 3 finished but nothing feasible, 1 anything else
(stopped, nothing measured, a fault).
"""

from __future__ import annotations

import enum
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
import typer.completion
from typer.core import TyperGroup

from orchestrator import __version__, texts
from orchestrator.terminal import crash, streams
from orchestrator.verbs import completion, decide, measure


class _Verbs(TyperGroup):
    """The verbs, with what the command line's library would end in its own way carried past it."""

    def invoke(self, ctx):
        return crash.carry(lambda: super(_Verbs, self).invoke(ctx))


typer.completion.install = completion.install  # Typer's own rewrites the user's shell files

app = typer.Typer(
    name="safebasin",
    cls=_Verbs,
    help="Fine-tune a language model for its task without losing its safety: search strategies under a hard safety limit.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigOption = Annotated[
    str | None, typer.Option("--config", "-c", metavar="FILE", help="YAML file or preset name; the pocket preset without it.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, e.g. search.trials=3")]


class Kind(enum.StrEnum):
    """What `list` can list."""

    recipes = "recipes"
    strategies = "strategies"
    suites = "suites"
    attacks = "attacks"
    judges = "judges"
    presets = "presets"


def _version(given: bool) -> None:
    if given:
        print(__version__)
        raise typer.Exit


@app.callback()
def top(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")] = False) -> None:
    """Options of the program itself; its help is the app's."""


@app.command()
def run(
    config: ConfigOption = None,
    overrides: Overrides = None,
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="DIR", help="The same as output.dir=DIR.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything that can be checked without a device, and end.")] = False,
    exit_zero: Annotated[
        bool, typer.Option("--exit-zero", help="Exit with 0 also when nothing is feasible: for schedulers that repeat what fails.")
    ] = False,
) -> None:
    """Run an experiment: baseline, search, confirmation, report."""
    settings = _load(config, [*(overrides or []), *([f"output.dir={output}"] if output is not None else [])])
    if dry_run:
        return _validate(settings)
    _run(settings, exit_zero)


@app.command()
def resume(
    folder: Annotated[str, typer.Argument(help="Output folder, or address, of the run that was interrupted.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="What no finished trial depends on, e.g. search.trials=+20 ray.lanes=2")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try every failed trial again. Without it only those a machine's or safebasin's fault failed.")
    ] = False,
) -> None:
    """Go on with an interrupted run: finished trials are kept, interrupted ones go on from their checkpoints.

    A run that came to its end goes on too where it is given more trials (search.trials=+20).
    """
    from orchestrator.experiment import resume as resuming
    from orchestrator.verbs import opening

    _run(opening.without_gpu_warnings(resuming.load(folder, overrides or [])), retry_failed=retry_failed)


@app.command()
def reproduce(
    folder: Annotated[str, typer.Argument(metavar="DIR|URI", help="Output folder, or address, of the run to reproduce.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="A new folder; outputs/reproduce-NAME without it.")] = None,
) -> None:
    """Run a run again (same config, seeds, data) into a new folder and say what differs. Exits with 3 where anything does."""
    from orchestrator.terminal import screen
    from orchestrator.verbs import reproduce as reproducing

    found, _ = reproducing.reproduce(folder, output, screen.console(steady=True))
    raise typer.Exit(found.exit_code)


@app.command()
def submit(
    config: ConfigOption = None,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="Job server, e.g. http://127.0.0.1:8265; without it RAY_ADDRESS.")] = None,
    submission_id: Annotated[str | None, typer.Option(help="Name of the job; the same one never runs twice.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show the job's log and return its exit code.")] = False,
    shared_paths: Annotated[bool, typer.Option("--shared-paths", help="Upload nothing: every path exists on the cluster.")] = False,
) -> None:
    """Run an experiment as a job of a Ray cluster."""
    from orchestrator.data import made_up
    from orchestrator.verbs import submit as jobs

    settings = _load(config, overrides)
    made_up.refuse(settings, elsewhere=True)
    raise typer.Exit(jobs.submit(settings, address=address, submission_id=submission_id, follow=follow, shared_paths=shared_paths))


def _run(settings, exit_zero: bool = False, retry_failed: bool = False) -> None:
    from orchestrator.terminal import screen
    from orchestrator.verbs import running

    outcome = running.run(settings, screen.console(steady=True), retry_failed)
    raise typer.Exit(0 if exit_zero and outcome.exit_code == 3 else outcome.exit_code)


def _load(path: str | None, overrides: list[str] | None, *sources: str):
    from orchestrator.verbs import opening

    return opening.load(path, overrides or [], *sources)


@app.command()
def validate(config: ConfigOption = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a config, its data and its model without taking a device."""
    _validate(_load(config, overrides), as_json)


def _validate(settings, as_json: bool = False) -> None:
    from orchestrator.experiment import checks
    from orchestrator.lanes import capacity
    from orchestrator.terminal import screen

    console = screen.console()
    found = checks.check(settings, build_pocket=False)
    checks.check_destination(settings)
    if as_json:
        body = {"name": settings.name, "valid": True, "recipes": list(settings.recipe_names), "trials": settings.search.trials}
        return _print_json(body | {"facts": found.facts, "warnings": found.warnings})
    for line in found.facts:
        screen.say(console, line)
    for line in found.warnings:
        screen.say(console, f"warning: {line}", "yellow")
    counts = f"{capacity.count(len(settings.recipes), 'recipe')}, {capacity.count(settings.search.trials, 'trial')}"
    screen.say(console, f"{settings.name}: valid; {counts}", "green")


@app.command("config-schema")
def config_schema() -> None:
    """Print the JSON schema of the config file."""
    from orchestrator import config as configuration

    print(json.dumps(configuration.json_schema(), indent=2))


@app.command("list")
def list_(kind: Annotated[Kind, typer.Argument(help="What to list.")], as_json: AsJson = False) -> None:
    """List recipes, strategies, suites, attacks, judges or presets."""
    from orchestrator.verbs import listing

    if as_json:
        return _print_json(listing.rows(kind.value))
    listing.show(kind.value)


def _print_json(body: object) -> None:
    print(json.dumps(body, indent=2))


@app.command()
def doctor(config: ConfigOption = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what this machine and cluster offer, and what of a config would not fit."""
    from orchestrator.verbs import doctor as examination

    raise typer.Exit(examination.show(config, overrides or [], as_json))


@app.command()
def render(
    overlay: Annotated[str, typer.Option("--overlay", metavar="NAME", help="local-cpu, gpu-single, gpu-multi-node, kueue, or a kustomize folder.")],
    config: ConfigOption = None,
    overrides: Overrides = None,
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR|-", help="Folder for shared.yaml and run.yaml; - for stdout.")] = "-",
    image: Annotated[str | None, typer.Option("--image", metavar="REF", help="Image of every pod, NAME:TAG@sha256:...")] = None,
) -> None:
    """Write the Kubernetes manifests of an experiment: a RayJob that is ready to apply."""
    from orchestrator.verbs import render as rendering

    # output.dir is below the results volume whatever the file says; its variables exist in the pods only
    settings = _load(config, [*(overrides or []), "output.dir=results"])
    if output != "-":
        rendering.check_output(output, settings)
    manifests = rendering.render(settings, overlay, image)
    for line in manifests.warnings:
        streams.tell(f"warning: {texts.clean(line)}", sys.stderr)
    if output == "-":
        print(rendering.to_yaml([*manifests.shared, *manifests.run]), end="")
        return
    for path in rendering.write(manifests, output):
        print(texts.clean(f"kubectl apply --server-side -f {shlex.quote(str(path))}"))


@app.command("locate-layers")
def locate_layers(
    config: ConfigOption = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL] [KEY=VALUE]...", help="Hub id or folder, and dotted overrides, e.g. safety.data=FILE")
    ] = None,
    onset: Annotated[float, typer.Option(help="Gap of cosines from which on a layer counts.")] = 0.05,
    alpha: Annotated[float, typer.Option(help="Factor on a range's weights when over-rejection is counted.")] = 1.1,
    prompts: Annotated[int, typer.Option(min=2, help="Prompts of each class.")] = 100,
    seeds: Annotated[int, typer.Option(min=1, max=10_000, help="Draws of prompts and pairs, for the intervals.")] = 10,
) -> None:
    """Measure in which layers a model tells malicious from normal prompts; for freeze_layers with range=auto."""
    from orchestrator.experiment import places
    from orchestrator.terminal import screen
    from orchestrator.verbs import locate

    words = list(overrides or [])
    if words and "=" not in words[0]:
        words[0] = f"model.model_name_or_path={words[0]}"
    settings = _load(config, words, "task.data", "safety.data")
    folder = settings.output_dir.absolute()
    places.check_output(folder, "locate", places.inputs(settings), field="output.dir")
    found = locate.measure(settings, locate.Settings(onset, alpha, prompts, seeds=seeds))
    locate.show(found, folder, screen.console())


@app.command()
def apply(
    strategy: Annotated[str, typer.Argument(help="A method that acts after training, e.g. safe_lora.")],
    model: Annotated[str, typer.Option(help="The tuned model: folder or hub id of a whole model, or a PEFT adapter folder.")],
    aligned: Annotated[str, typer.Option(help="The model the tuning started from.")],
    output: Annotated[str, typer.Option("--output", "-o", help="New folder for the result.")],
    knobs: Annotated[list[str] | None, typer.Argument(metavar="[KNOB=VALUE]...", help="The method's settings.")] = None,
    unaligned: Annotated[str | None, typer.Option(help="The aligned model before its alignment.")] = None,
    safety: Annotated[str | None, typer.Option(help="Safety rows: prompts with refusals.")] = None,
    harmful: Annotated[str | None, typer.Option(help="Harmful prompts with harmful answers.")] = None,
    task: Annotated[str | None, typer.Option(help="Task rows, for methods that guard the task.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of what is drawn at random.")] = 0,
) -> None:
    """Apply a merging, projecting or restoring method to a model that was tuned elsewhere."""
    from orchestrator.terminal import screen
    from orchestrator.verbs import apply as application

    request = application.Request(
        strategy, model, aligned, Path(output), tuple(knobs or ()), unaligned, safety, harmful, task, device, seed
    )  # fmt: skip
    application.run(request, screen.console())


measure.register(app)
decide.register(app)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def main() -> None:
    """Console script. Whatever happens ends in one sentence on stderr and an exit code (see `crash`)."""
    sys.exit(crash.outcome(lambda: app(standalone_mode=False)))  # without standalone mode an Exit is returned as its code
