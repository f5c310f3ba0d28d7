"""What all pictures share: colours, markers, sizes, and how one becomes PNG."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.decision.intervals import Estimate
from orchestrator.texts import clean, one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")


MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


LIMIT_COLOUR = "#B00020"


DPI = 150


class Png(bytes):
    """A picture as PNG that knows the figure it was drawn from."""

    figure: Any


@dataclass(frozen=True)
class Plot:
    """One picture, or the sentence that stands for it."""

    name: str
    """File stem, e.g. `score_against_degradation`."""
    title: str
    png: bytes | None
    text: str
    """What the picture shows (its alternative text), or why there is none."""


@functools.cache
def _drawing() -> type[Figure]:
    """The class of our figures; made at first use, because matplotlib is heavy."""
    from matplotlib.figure import Figure

    class Drawing(Figure):
        """A figure that a notebook shows by itself, also where pyplot was never imported."""

        def _repr_png_(self) -> bytes:
            return bytes(png(self))

    return Drawing


def sentence(title: str, text: str) -> Figure:
    """A figure that says why there is no picture."""
    import textwrap

    made, (axis,) = figure(8.6, 1.6)
    axis.set_axis_off()
    axis.set_title(written(title), fontsize=11, loc="left")
    axis.text(0.0, 0.9, "\n".join(textwrap.wrap(clean(text), 100)), va="top", fontsize=9, transform=axis.transAxes)
    return made


def figure(width: float = 8.0, height: float = 4.8, columns: int = 1):
    """A figure without pyplot's global state (safe in threads), on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _drawing()(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(True, color="#E4E4E4", linewidth=0.8)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    return figure, axes


def png(figure: Any) -> Png:
    """The figure as PNG. Names in it are texts: `$` starts no formula; what the font lacks is drawn as a box, without a warning."""
    import warnings

    import matplotlib
    from matplotlib.text import Text

    buffer = io.BytesIO()
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph|.*missing from (current )?font|constrained_layout not applied", UserWarning)
        for text in figure.findobj(Text):
            text.set_parse_math(False)
            text.set_text(clean(text.get_text()))
        figure.savefig(buffer, format="png", metadata={"Software": None})  # no version inside: the same figures give the same file
    made = Png(buffer.getvalue())
    made.figure = figure
    return made


def written(label: Any) -> str:
    """A name as a picture writes it: at most 60 characters a line; matplotlib leaves labels that begin with `_` out of legends."""
    lines = [one_line(line, 60) for line in str(label).split("\n")]
    text = "\n".join(lines)
    return f" {text}" if text.startswith("_") else text


def bar(estimate: Estimate) -> list[list[float]]:
    """Asymmetric error bar around the value, as matplotlib wants it."""
    return [[max(0.0, estimate.value - estimate.lower)], [max(0.0, estimate.upper - estimate.value)]]
