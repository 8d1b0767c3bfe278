"""How plots look, and the files they become. Colours are Okabe and Ito's, which people with any
kind of colour vision tell apart; lines differ in dashes and marks, areas in hatching, too."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

BLACK, ORANGE, SKY, GREEN = "#16202b", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, RED, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#8a949e"
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "oo")
_INCHES = (5.4, 3.5)
_DPI = 160
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlecolor": BLACK,
    "axes.labelcolor": "#3d4854",
    "axes.edgecolor": "#9aa4ae",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6eaee",
    "grid.linewidth": 0.8,
    "xtick.color": "#3d4854",
    "ytick.color": "#3d4854",
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "hatch.linewidth": 0.5,
    "hatch.color": "white",
    "svg.hashsalt": "knl",
    "svg.fonttype": "path",
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Plot:
    """A picture as files. `caption`: says what it shows, to those who do not see it, too."""

    name: str
    caption: str
    svg: bytes
    png: bytes
    wide: bool = False


def draw(
    name: str,
    title: str,
    caption: str,
    paint: Callable[[Any], None],
    *,
    inches: tuple[float, float] = _INCHES,
    wide: bool = False,
) -> Plot:
    """Let `paint` draw into the axes of an empty figure."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    svg, png = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=inches)
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_title(title)
        paint(axes)
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(png, format="png", dpi=_DPI)
    return Plot(name, caption, svg.getvalue(), png.getvalue(), wide)


def plain(text: str) -> str:
    """Text that matplotlib will not take for a formula."""
    return text.replace("$", r"\$")


def binned(
    x: Sequence[float], y: Sequence[float], bins: int = 150
) -> tuple[list[float], list[float], list[float], list[float]]:
    """So many runs of neighbours at most: the middle x, the median y, the 5 % and 95 % points of y.
    What is not a number is left out."""
    import numpy as np

    pairs = np.array([(a, b) for a, b in zip(x, y) if np.isfinite(a) and np.isfinite(b)])
    if not len(pairs):
        return [], [], [], []
    parts = np.array_split(pairs, min(bins, len(pairs)))
    middle = [float(part[:, 0].mean()) for part in parts]
    low, mid, high = (
        [float(np.percentile(part[:, 1], q)) for part in parts] for q in (5.0, 50.0, 95.0)
    )
    return middle, mid, low, high


def legend_below(axes: Any, columns: int) -> None:
    """Under the plot, where it hides nothing."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=columns, columnspacing=1.2)


def node_axis(axes: Any, nodes: Sequence[int], what: str) -> None:
    """Numbers of nodes on a scale where each doubling is a step."""
    axes.set_xscale("log", base=2)
    ticks = list(nodes)
    while len(ticks) > 10:  # labels need room
        ticks = ticks[-1::-2][::-1]
    axes.set_xticks(ticks)
    axes.set_xticklabels([str(n) for n in ticks])
    axes.minorticks_off()
    axes.set_xlabel(what)
    if len(nodes) == 1:
        axes.set_xlim(nodes[0] / 2, nodes[0] * 2)
