"""Figure: a plot as inline SVG that takes the colours of the page, light or dark, with a text that says what it shows.

Lines and words that have no colour of their own are drawn in `currentColor`; text stays text.
"""

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator

COLOURS = ("#0f8f83", "#d9640b", "#7a5cd0", "#c2357a", "#3f7fd1", "#8a8f00", "#a1543b", "#5b7083")
INK = "#010203"  # becomes currentColor
STEPS = "learner step"
LEAST_TOP = 0.1  # of an axis that begins at 0
SHORT = 24  # characters of labels of which two stand beside each other
POINTS = 240  # most of a line; more are means of neighbours
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "diffpo",
    "font.family": "sans-serif",
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "legend.frameon": False,
    "legend.fontsize": 11,
}


@dataclass
class Figure:
    """What the page shows of one plot."""

    title: str
    about: str
    """What is drawn, in a line."""
    svg: str = ""
    said: list[str] = field(default_factory=list)
    """What a person who cannot see it is told."""

    @property
    def alt(self) -> str:
        return html.escape(f"{self.title}. {'; '.join(self.said) or 'nothing yet'}.", quote=True)


@contextmanager
def drawn(figure: Figure, *, x: str = STEPS, y: str = "", height: float = 3.0) -> Iterator[Any]:
    """Axes to draw on; at the end they become the figure's SVG."""
    with mpl.rc_context(STYLE):
        drawing = Drawing(figsize=(5.4, height), layout="constrained")
        axes = drawing.subplots()
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(True)
        axes.ticklabel_format(useOffset=False)
        if x == STEPS:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        yield axes
        if axes.get_ylim()[0] == 0 and axes.get_ylim()[1] < LEAST_TOP:
            axes.set_ylim(0, LEAST_TOP)
        labels = axes.get_legend_handles_labels()[1]
        if len(labels) > 1:
            drawing.legend(loc="outside lower center", ncols=2 if max(map(len, labels)) < SHORT else 1)
        made = io.StringIO()
        drawing.savefig(made, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    figure.svg = _inline(made.getvalue())


def line(axes: Any, figure: Figure, x: Sequence[float], y: Sequence[float], label: str, colour: str, **kw: Any) -> None:
    """A line, and the words for it; nothing of no points."""
    if not len(x):
        return
    axes.plot(*thinned(x, y), color=colour, label=literal(label), linewidth=1.8, **kw)
    figure.said.append(f"{label}: from {y[0]:.4g} to {y[-1]:.4g}, between {min(y):.4g} and {max(y):.4g}")


def literal(text: str) -> str:
    """A text that matplotlib draws as it is: between two dollar signs it would read mathematics."""
    return text.replace("$", r"\$")


def band(axes: Any, x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> None:
    """What lies between two lines; the axes are those of the lines, wherever it ends."""
    if len(x):
        axes.set_autoscale_on(False)
        axes.fill_between(thinned(x, low)[0], thinned(x, low)[1], thinned(x, high)[1], color=colour, alpha=0.2, lw=0)


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most `POINTS` points, means of neighbours."""
    parts = min(len(x), POINTS)
    pairs = zip(np.array_split(np.asarray(x, float), parts), np.array_split(np.asarray(y, float), parts), strict=True)
    means = np.array([(one.mean(), other.mean()) for one, other in pairs])
    return means[:, 0], means[:, 1]


def _inline(svg: str) -> str:
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (?:width|height)="[^"]*"', "", opening)  # the page's width, the view box's shape
    opening = opening.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
    return f"{opening}>{rest}".replace(INK, "currentColor")
