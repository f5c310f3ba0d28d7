"""`safebasin locate-layers`: where a model tells malicious from normal prompts, as a table, a picture and a JSON file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.config import Experiment
from orchestrator.errors import ConfigError
from orchestrator.models import loading
from orchestrator.records import LaneContext
from orchestrator.report.plots import canvas
from orchestrator.storage import files, ownership
from orchestrator.terminal import screen
from orchestrator.trial import materials
from orchestrator.trial.training_data import training_data

if TYPE_CHECKING:
    from rich.console import Console

    from strategies.locate import Curves, Located

PROMPT_SEED = 0


@dataclass(frozen=True)
class Settings:
    """Knobs of the measurement; those of `freeze_layers` with `range: auto` have the same names and defaults."""

    onset: float = 0.05
    alpha: float = 1.1
    prompts: int = 100
    pairs: int = 500
    seeds: int = 10


@dataclass(frozen=True)
class Measured:
    """What was found, and of what."""

    found: Located | Curves
    settings: Settings
    model: str
    counted: dict[str, int]
    """Prompts of each class."""

    @property
    def curves(self) -> Curves:
        return getattr(self.found, "curves", self.found)

    @property
    def range(self) -> tuple[int, int] | None:
        return getattr(self.found, "range", None)


def measure(experiment: Experiment, settings: Settings) -> Measured:
    """Locate the safety layers of the experiment's model with its task and safety rows. Raises ConfigError where rows are missing."""
    from strategies import locate
    from strategies.base import StrategyError

    context = LaneContext(device="cuda" if experiment.ray.use_gpu else "cpu")
    found = materials.load(experiment)
    model, tokenizer = loading.load(experiment.model, device=context.device)
    data, _ = training_data(experiment, tokenizer, found, context, PROMPT_SEED)
    try:
        classes = locate.prompts_of(data, settings.prompts)
        result = locate.locate(
            model, data, onset=settings.onset, alpha=settings.alpha, prompts=settings.prompts, pairs=settings.pairs, seeds=settings.seeds
        )
    except StrategyError as error:
        raise ConfigError(f"locate-layers: {error}") from error
    counted = dict(zip(("normal", "malicious", "over_rejection"), map(len, classes), strict=True))
    return Measured(result, settings, experiment.model.model_name_or_path, counted)


def content(measured: Measured) -> dict[str, Any]:
    """The measurement as plain values: per layer mean, lower and upper of each angle (degrees) and of the gap (cosines), the range, the
    counts."""
    from strategies import locate

    curves, found = measured.curves, measured.found
    parts = {
        "normal_normal": locate.degrees(curves.normal), "malicious_malicious": locate.degrees(curves.malicious),
        "normal_malicious": locate.degrees(curves.mixed), "gap_degrees": locate.degrees(curves.mixed) - locate.degrees(curves.normal),
        "gap": curves.gap,
    }  # fmt: skip
    numbers = {name: [part.tolist() for part in locate.interval(values)] for name, values in parts.items()}
    layers = [
        {"layer": i, **{name: dict(zip(("mean", "lower", "upper"), (part[i] for part in of), strict=True)) for name, of in numbers.items()}}
        for i in range(curves.gap.shape[1])
    ]
    counts = [{"start": a, "end": b, "refused": n} for (a, b), n in sorted(getattr(found, "counts", {}).items())]
    return {
        "model": measured.model, "settings": vars(measured.settings), "prompts": measured.counted, "layers": layers,
        "activations": _pair(getattr(found, "onset", None)), "range": _pair(measured.range),
        "over_rejection": {"asked": getattr(found, "asked", 0), "untouched": getattr(found, "untouched", 0), "scaled": counts},
    }  # fmt: skip


def _pair(found: tuple[int, int] | None) -> dict[str, int] | None:
    return None if found is None else {"start": found[0], "end": found[1]}


def show(measured: Measured, folder: Path, console: Console) -> list[Path]:
    """Print the table and the range, write `safety_layers.json` and `safety_layers.png` into `folder`; their paths."""
    body = content(measured)
    what = "degrees between last-token activations of two normal prompts (NN), two malicious ones (MM), one of each (NM); mean \u00b1 95%"
    screen.say(console, what)
    screen.show(console, _table(body))
    screen.say(console, sentence(body), "bold")
    rejections = body["over_rejection"]
    if rejections["scaled"]:
        screen.show(console, _counts(body))
    with ownership.active(folder, "locate"):  # in a run's folder too: the run's files are not touched
        paths = [files.write_json(folder / "safety_layers.json", body), files.write_bytes(folder / "safety_layers.png", picture(body))]
    for path in paths:
        screen.say(console, str(path), whole=True)
    return paths


def _table(body: dict[str, Any]):
    table = screen.Grid(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    for column in ("layer", "NN", "MM", "NM", "NM-NN", "cosine gap", ""):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    inside = body["range"]
    for row in body["layers"]:
        cells = [_cell(row[name], 1) for name in ("normal_normal", "malicious_malicious", "normal_malicious", "gap_degrees")]
        mark = "safety" if inside and inside["start"] <= row["layer"] <= inside["end"] else ""
        table.add_row(str(row["layer"]), *cells, _cell(row["gap"], 3), mark)
    return table


def _cell(value: dict[str, float], digits: int) -> str:
    return f"{value['mean']:.{digits}f} \u00b1 {value['upper'] - value['mean']:.{digits}f}"


def _counts(body: dict[str, Any]):
    table = screen.Grid(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    for column in ("layers scaled", f"refused of {body['over_rejection']['asked']} harmless", ""):
        table.add_column(column, justify="right")
    table.add_row("none", str(body["over_rejection"]["untouched"]), "")
    for row in body["over_rejection"]["scaled"]:
        chosen = body["range"] == {"start": row["start"], "end": row["end"]}
        table.add_row(f"{row['start']} to {row['end']}", str(row["refused"]), "chosen" if chosen else "")
    return table


def sentence(body: dict[str, Any]) -> str:
    """The outcome in one sentence, with what it rests on."""
    count, prompts = len(body["layers"]), body["prompts"]
    if body["range"] is None:
        largest = max(row["gap"]["mean"] for row in body["layers"])
        return (
            f"no safety layers found: no layer of {count} sets normal and malicious prompts apart by more than {body['settings']['onset']:g} "
            f"(largest gap {largest:.3f}; {prompts['normal']} and {prompts['malicious']} prompts); lower --onset"
        )
    start, end, first = body["range"]["start"], body["range"]["end"], body["activations"]
    counts = {(row["start"], row["end"]): row["refused"] for row in body["over_rejection"]["scaled"]}
    asked = body["over_rejection"]["asked"]
    if not asked:
        how = "by activations alone, since there are no harmless safety rows to count over-rejection on"
    elif max(counts.values()) == min(counts.values()):
        how = (
            f"by activations; scaling by {body['settings']['alpha']:g} made no difference between ranges ({max(counts.values())} of {asked} "
            "harmless prompts refused; a larger --alpha may)"
        )
    else:
        how = (
            f"activations say {first['start']} to {first['end']}; scaled by {body['settings']['alpha']:g}, {counts[start, end]} of {asked} harmless "
            f"prompts are refused (untouched {body['over_rejection']['untouched']})"
        )
    return f"safety layers {start} to {end} of {count} (counted from 0, both inclusive): {how}"


def picture(body: dict[str, Any]) -> bytes:
    """PNG: the three angles by layer with their intervals, and the gap of cosines with onset and range."""
    figure, (left, right) = canvas.figure(11.0, 4.4, 2)
    layers = [row["layer"] for row in body["layers"]]
    kinds = {"normal_normal": "two normal prompts", "malicious_malicious": "two malicious prompts", "normal_malicious": "one of each"}
    for i, (name, label) in enumerate(kinds.items()):
        _curve(left, layers, [row[name] for row in body["layers"]], i, label)
    _curve(right, layers, [row["gap"] for row in body["layers"]], 3, "gap")
    onset = body["settings"]["onset"]
    right.axhline(onset, color="#555555", linestyle="--", linewidth=1.1)
    right.annotate(f"onset {onset:g}", (layers[0], onset), xytext=(0, 3), textcoords="offset points", fontsize=9)
    for axis, title, label in (
        (left, "Angle between last-token activations", "degrees"),
        (right, "How much more alike two normal prompts are", "gap of mean cosines"),
    ):
        if body["range"]:
            axis.axvspan(body["range"]["start"] - 0.5, body["range"]["end"] + 0.5, color="#009E73", alpha=0.12, linewidth=0, zorder=0)
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xlabel("decoder layer (0 is the first)")
        axis.set_ylabel(label)
        axis.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
        if len(layers) <= 20:
            axis.set_xticks(layers)
    left.legend(frameon=False, fontsize=9)
    shown = f"layers {body['range']['start']} to {body['range']['end']} shaded" if body["range"] else "none located"
    figure.suptitle(f"{canvas.written(body['model'])}: safety layers, {shown}; bands are 95% over draws of prompts", fontsize=11, x=0.01, ha="left")
    return canvas.png(figure)


def _curve(axis: Any, layers: list[int], values: list[dict[str, float]], style: int, label: str) -> None:
    colour, marker = canvas.COLOURS[style], canvas.MARKERS[style]
    axis.fill_between(layers, [v["lower"] for v in values], [v["upper"] for v in values], color=colour, alpha=0.18, linewidth=0)
    axis.plot(layers, [v["mean"] for v in values], color=colour, marker=marker, markersize=4.5, linewidth=1.6, label=label)
